"""Models as values, and how they are executed and searched."""
