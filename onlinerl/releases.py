"""Installed releases of packages, and those that are known to compute wrongly. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import re

Release = tuple[int, ...]

# Reported silent gradient errors of ZeRO-2, first and last release: DeepSpeed issues 7718 and 8224.
DEEPSPEED_WRONG_GRADIENTS = ((0, 17, 6), (0, 19, 3))


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> Release:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def dotted(release: Release) -> str:
    """The reverse."""
    return ".".join(map(str, release))


def deepspeed_fault(release: Release) -> str | None:
    """What is wrong with that release of DeepSpeed, under ZeRO-2 only; None if nothing is known."""
    first, last = DEEPSPEED_WRONG_GRADIENTS
    if first <= release <= last:
        return (
            f"ZeRO-2 of DeepSpeed {dotted(first)} to {dotted(last)} can compute wrong gradients without a sign of it "
            "(its issues 7718 and 8224)"
        )
    return None
