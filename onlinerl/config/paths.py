"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from onlinerl.errors import ConfigError


def at_home(path: str, field: str) -> Path:
    """A path in which a leading `~` or `~USER` is that home directory.

    Raises:
        ConfigError: if there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path} is in the home of a user that is not there", field=field, fix=f"write ./{path}") from None
