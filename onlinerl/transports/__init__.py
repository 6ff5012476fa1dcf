"""How weights travel, one file or folder per transport, and the proof of delivery."""
