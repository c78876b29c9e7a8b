"""Architectures, their names and sizes, and their weights."""
