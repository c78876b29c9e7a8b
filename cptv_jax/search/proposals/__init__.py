"""Proposers: propose steps for all stages at once."""
