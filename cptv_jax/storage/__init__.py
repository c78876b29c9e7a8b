"""Files, checkpoints and run directories."""
