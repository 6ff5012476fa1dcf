"""One file per way to sample."""
