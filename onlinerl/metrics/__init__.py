"""What is measured: every metric once, with its meaning, unit, estimator and smallest n."""
