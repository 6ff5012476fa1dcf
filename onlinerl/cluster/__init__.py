"""The only home of Ray."""
