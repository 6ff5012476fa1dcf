"""Many runs of one comparison: algorithms, oracles, pairings, seeds or any other keys, on the same prompts and the same budget."""
