"""Widths that differ from site to site, chosen under a budget."""
