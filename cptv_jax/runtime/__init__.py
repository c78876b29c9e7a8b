"""Running stages: compiled programs, devices, arithmetic."""
