"""The loop: one iteration as a resumable object."""
