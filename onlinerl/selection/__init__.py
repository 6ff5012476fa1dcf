"""Prompt selectors: one file each, found by its name."""
