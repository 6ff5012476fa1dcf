"""Weight transport, sender and receiver halves together, and proof of delivery."""
