"""The phases of an iteration: one file each, a function of the iteration that returns what is recorded."""
