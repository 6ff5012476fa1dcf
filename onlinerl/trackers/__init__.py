"""One file per place that figures go to."""
