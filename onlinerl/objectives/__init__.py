"""What reward and preference models are trained for: one file each, chosen by its name."""
