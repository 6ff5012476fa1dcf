"""Pure tensor math used by two or more algorithms."""
