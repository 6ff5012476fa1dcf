"""Values that cross a stage boundary: frozen, keyword-only, serialisable, without torch.

`from onlinerl.types import Verdict` finds it in its file, which is imported only then: a loss does not pull in all of them.
"""

from importlib import import_module
from typing import Any

_FILES = "training prompts goals directions rollouts labels numbers plan records selection seeds tables phases".split()  # noqa: SIM905  (a line, which every loss pulls in, instead of fourteen)


def __getattr__(name: str) -> Any:
    for part in () if name.startswith("_") else _FILES:
        found = vars(import_module(f"{__name__}.{part}"))
        if name in found:
            return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
