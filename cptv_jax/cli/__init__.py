"""The command `cptv`."""
