"""onlinerl: online iterative RLHF, the whole loop."""

__version__ = "0.1.0"
