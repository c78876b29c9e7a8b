"""What base methods measure on calibration images."""
