"""Block reconstruction after a base method."""
