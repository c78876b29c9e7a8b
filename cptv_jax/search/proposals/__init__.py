"""What proposes steps for all stages at once."""
