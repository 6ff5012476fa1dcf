"""Values that no key may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from onlinerl.errors import ConfigError

_SECRET = re.compile(r"(^|_)(api)?(key|token|password|passwd|secret|credential|authorization)s?$")
_PLAIN_KEY = re.compile(r"(^|_)(?<!api_)(?<!access_)(?<!auth_)(?<!private_)(?<!secret_)keys?$")
"""As in `input_key`, which other trainers have and which names a column."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CREDENTIALS = re.compile(
    r"://[^/@\s]*:[^/@\s]+@|[?&][^=&\s]*(key|token|password|secret)=[^&\s]|^\s*bearer\s+\S+\s*$", re.IGNORECASE
)
_WORD_ENDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|-")


def refuse_values(tree: Mapping[str, Any], *, unknown_keys: bool = False) -> None:
    """Refuse what no key may hold: numbers without an end, and secrets, because the configuration is stored with the run.

    Args:
        tree: of a configuration.
        unknown_keys: whether there may be keys that nothing has; one that is merely called a key is then not taken for a secret.

    Raises:
        ConfigError: naming the key, never the value.
    """
    for key, value in _leaves(tree):
        if unknown_keys and _PLAIN_KEY.search(_plain_name(key)):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"is {value}", field=key, fix="give a finite number")
        if not isinstance(value, str):
            continue
        name = _plain_name(key)
        if _SECRET.search(name) and value:
            raise ConfigError(
                "looks like a secret, and the configuration is stored with the run and shown to people",
                field=key,
                fix=f"put it into an environment variable and give that variable's name as `{name}_env`, for the component to read",
            )
        if _SECRET.search(name.removesuffix("_env")) and not _VARIABLE.fullmatch(value):
            raise ConfigError(
                "is not the name of an environment variable", field=key, fix="give the name, e.g. JUDGE_API_KEY; not its value"
            )
        if _CREDENTIALS.search(value):
            raise ConfigError(
                "holds a secret, and the configuration is stored with the run and shown to people",
                field=key,
                fix="give the address without it, and let the component read it from an environment variable",
            )


def _plain_name(key: str) -> str:
    """The last part of a dotted key, as Python would write it."""
    return _WORD_ENDS.sub("_", key.rsplit(".", 1)[-1]).lower()


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping or list, with its dotted key."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, prefix)
    else:
        yield prefix, tree
