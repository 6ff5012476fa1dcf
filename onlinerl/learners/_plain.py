"""Reading a learner's files as plain data.

A pickle can run any code when it is loaded, and run directories are copied between people and machines. So nothing of one is
unpickled: what `torch.save` wrote is read with torch's restricted loader, and the states of random generators are JSON.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onlinerl.errors import LearnerError


def load_plain(path: str | Path, also: Sequence[Any] = (), map_location: Any = None, *, mapped: bool = False) -> Any:
    """A file written by `torch.save`, if it holds nothing but tensors, plain containers and values of the classes in `also`.

    With `mapped`, tensors stay in the file until they are read.

    Raises:
        LearnerError: if it holds anything else.
    """
    try:
        with torch.serialization.safe_globals(list(also)):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        raise LearnerError(
            f"{path} holds something else than tensors and is not loaded: {error}",
            field="checkpoints",
            fix="no learner wrote this: restore the checkpoint from where you trust it, or start a new run",
        ) from error


def save_generators(path: Path) -> None:
    """The states of all random generators of this process, as JSON."""
    numpy_state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = numpy_state
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(each) for each in cuda],
    }
    path.write_text(json.dumps(state))


def load_generators(path: Path) -> None:
    """The reverse of `save_generators`.

    Raises:
        LearnerError: if the file is one of an older version, and holds more than numbers.
    """
    older = path.with_suffix(".pt")
    if not path.exists() and older.exists():
        array = np.empty(0, np.uint32)
        _set_older(load_plain(older, [array.__reduce__()[0], np.ndarray, np.dtype, type(array.dtype)]))
        return
    state = json.loads(path.read_text())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([_tensor(each) for each in state["cuda"]])


def _set_older(state: dict[str, Any]) -> None:
    """As `torch.save` wrote them before they were JSON."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _text(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
