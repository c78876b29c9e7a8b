"""Base methods: each makes a first quantized model from a float one and calibration images."""
