"""Whether a directory is the run that somebody means, in a format that can be read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onlinerl.errors import StoreError
from onlinerl.stores import _files

READABLE = (1, 2, 3, 4, 5, _files.FORMAT)
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
LOCK = "lock"


def require_readable(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a format that this version does not know, and a manifest that lacks what a resume needs."""
    found = manifest.get("format")
    if found not in READABLE:
        raise StoreError(
            f"{path} has format {found!r}, this version of onlinerl reads formats {', '.join(map(str, READABLE))}",
            field="name",
            fix="resume it with the version that wrote it, or start a new run",
        )
    lacking = [k for k, kind in (("name", str), ("fingerprint", dict)) if not isinstance(manifest.get(k), kind)]
    if lacking:
        raise _files.damaged(path / MANIFEST, f"it does not say {' and '.join(lacking)} of the run")


def require_same(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to take one run for another."""
    if stored.get("config_digest") == wanted.get("config_digest"):
        return
    before, now = stored.get("fingerprint") or {}, wanted.get("fingerprint") or {}
    changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    differs = f"; it differs in {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}" if changed else ""
    raise StoreError(
        f"{path} already holds a different run{differs}",
        field="name",
        fix="give the new run another `name`, or set the old one aside with --fresh",
    )


def require_empty(path: Path) -> None:
    """Refuse to start a run among other files."""
    ours = {LOCK, CONFIG}  # what a crash during `create` may have left
    others = sorted(p.name for p in path.iterdir() if p.name not in ours and not p.name.endswith(_files.TEMPORARY))
    if others:
        raise StoreError(
            f"{path} holds files but no run ({', '.join(others[:3])})",
            field="name",
            fix="give the run another `name`, or empty it",
        )


def require_once_a_run(path: Path) -> None:
    """Refuse to set aside other people's files. A run that has lost its manifest is still known by what it has stored."""
    if not (path / MANIFEST).exists() and not ((path / CONFIG).exists() and (path / "iterations").is_dir()):
        require_empty(path)


def no_run(path: Path) -> StoreError:
    """The error for a directory without a run, which says where there is one."""
    runs = sorted(p.parent.name for p in path.parent.glob(f"*/{MANIFEST}"))
    known = f"runs in {path.parent}: {', '.join(runs)}" if runs else f"{path.parent} holds no run at all: check `runs`"
    return StoreError(f"{path} holds no run", field="name", fix=f"{known} (`ls {path.parent}` lists them)")
