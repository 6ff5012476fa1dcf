"""One file per way to step."""
