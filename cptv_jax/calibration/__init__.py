"""Measurements on calibration images, and the quantizers that base methods fit from them."""
