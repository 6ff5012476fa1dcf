"""`onlinerl train-rm`: training a reward or preference model on stored comparisons, and measuring what it is worth."""
