"""Where randomness comes from."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: object) -> int:
    """A 31-bit seed that depends on every part and on nothing else.

    Seeds are derived, never drawn: the same (run seed, iteration, prompt, sample) gives the same seed whatever the number of
    replicas, the order of arrival or the number of restarts.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF
