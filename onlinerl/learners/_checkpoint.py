"""DeepSpeed's checkpoint files, without a second copy of the state in memory."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine


class MappedCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's own way to disk. Files are mapped, so what is loaded takes memory only where it stays."""

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True  # the format that can be mapped; DeepSpeed's default where it gets a configuration

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file."""
        return torch.load(path, map_location=map_location, mmap=True, weights_only=False)
