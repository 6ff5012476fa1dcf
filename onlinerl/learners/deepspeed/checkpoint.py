"""DeepSpeed's checkpoint files, read without running any code that they may hold and without a second copy in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from onlinerl.learners._plain import load_plain


class PlainCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's own way to disk, but it loads tensors and plain containers only, and remembers what it wrote.

    Files are mapped, so what is loaded takes memory only where it stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True  # the format that can be mapped; DeepSpeed's default where it gets a configuration
        self.written: list[Path] = []
        self.only: frozenset[str] | None = None
        """Weights that are written, by name; None writes all. DeepSpeed takes one that is frozen for trained under its second name, if it is tied."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file."""
        if self.only is not None and "module" in state_dict:
            kept = {name: weight for name, weight in state_dict["module"].items() if name in self.only}
            state_dict = state_dict | {"module": kept}
        super().save(state_dict, path)
        self.written.append(Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file.

        Raises:
            LearnerError: if it holds anything else.
        """
        # Values without behaviour that DeepSpeed puts beside its tensors.
        return load_plain(path, [fragment_address, LossScaler, ZeroStageEnum], map_location, mapped=True)
