"""One file per way to judge."""
