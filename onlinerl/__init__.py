"""onlinerl: online iterative RLHF, the whole loop. From Python: `from onlinerl import Run, load_config`, see docs/python-api.md."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "list_runs", "load_config"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("onlinerl.api"), name)  # not before it is asked for, and every module may import this one
