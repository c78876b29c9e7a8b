"""Benches: many runs under one directory, and the table that compares them."""
