"""Prompt sources with an explicit cursor."""
