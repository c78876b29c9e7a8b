"""Recipes: for every site its quantizer, bits and granularity."""
