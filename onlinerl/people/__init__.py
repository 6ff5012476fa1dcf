"""Comparisons that people make: the queue on the disk that a run and the page share, the page, and how far people agree."""
