"""Replies that are paid for and whose verdict is not complete yet, on the disk of the run: a resume asks only for the others.

One JSON object per line in `replies.jsonl`, on the disk before the reply is used. The last line may be torn by a kill and is then left out.
When the file is full another one is begun, and the one before the last goes: verdicts of so long ago are complete.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

from onlinerl.errors import OracleError
from onlinerl.oracles._judge.endpoint import Reply, Token
from onlinerl.types import Cost

FULL_BYTES = 32 << 20


def paid(folder: Path) -> Cost:
    """What the replies in a folder have cost that are no part of a label yet; a folder that is not there is left so."""
    if not folder.is_dir():
        return Cost()
    kept = Kept(folder)
    kept.close()
    return kept.unlabelled()


class Kept:
    """Of one run.

    Args:
        folder: of it, for this oracle.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._older = folder / "replies.jsonl", folder / "replies.older.jsonl"
        self._replies: dict[str, list[Reply]] = {}
        self._open: dict[str, list[Cost]] = {}
        """Of the replies that are no part of a label. Older versions have not written which these are."""
        self._written = self._durable = 0
        """Lines of this process, and how many of them are on the disk for sure."""
        self._disk = asyncio.Lock()
        self._one_at_a_time = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._older.exists():
                self._read(self._older.read_bytes())
            self._file = self._opened()
            data = self._path.read_bytes()
            os.ftruncate(self._file, data.rfind(b"\n") + 1)
            self._read(data)
        except OSError as error:
            raise self._unusable(error) from error

    def _opened(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def _read(self, data: bytes) -> None:
        for line in data[: data.rfind(b"\n") + 1].splitlines():
            entry = _entry(line)
            if entry is None:  # damaged, or a block that a power cut left unwritten: that reply is asked for again
                continue
            if "counted" in entry:
                for key in entry["counted"]:
                    self._replies[key] = [_free(reply) for reply in self._replies.get(key, ())]
                    self._open.pop(key, None)
            elif "done" in entry:
                for key in entry["done"]:
                    for found in (self._replies.get(key), self._open.get(key)):
                        if found:
                            found.pop()
            else:
                if "open" in entry:
                    self._open.setdefault(entry["key"], []).append(Cost(**entry["cost"]))
                self._replies.setdefault(entry["key"], []).append(_from_entry(entry))

    def _begin_another(self) -> None:
        with self._one_at_a_time:
            os.fdatasync(self._file)  # what others have written meanwhile
            self._durable = self._written
            os.close(self._file)
            os.replace(self._path, self._older)
            self._file = self._opened()

    def unlabelled(self) -> Cost:
        """What those replies have cost that were no part of a label when they were read."""
        return reduce(Cost.plus, (cost for costs in self._open.values() for cost in costs), Cost())

    def take(self, key: str) -> Reply | None:
        """A reply of an earlier attempt, once."""
        replies = self._replies.get(key)
        return replies.pop() if replies else None

    async def put(self, key: str, reply: Reply) -> None:
        """Durable when it returns; replies that come while the disk is at work wait for it together."""
        tokens = [[token.text, dict(token.alternatives)] for token in reply.tokens]
        entry = {"key": key, "text": reply.text, "cut": reply.cut, "tokens": tokens, "cost": asdict(reply.cost)}
        self._write({**entry, "open": True})
        mine = self._written
        async with self._disk:
            if self._durable < mine:
                until = self._written
                try:
                    await asyncio.to_thread(os.fdatasync, self._file)
                    self._durable = until
                    if os.fstat(self._file).st_size > FULL_BYTES:
                        self._begin_another()
                except OSError as error:
                    raise self._unusable(error) from error

    def counted(self, keys: Sequence[str]) -> None:
        """A failure says already what these have cost: a later verdict must not say it again."""
        if keys:
            self._write({"counted": [*keys]})

    def done(self, keys: Sequence[str]) -> None:
        """A verdict that was made of them is on the disk."""
        if keys:
            self._write({"done": [*keys]})

    def close(self) -> None:
        """No more is kept."""
        os.close(self._file)

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps({"crc": _crc(entry), **entry}).encode() + b"\n"
        with self._one_at_a_time:
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise self._unusable(error) from error
            self._written += 1

    def _unusable(self, error: OSError) -> OracleError:
        return OracleError(f"{self._path} cannot be written: {error.strerror}", field="runs", fix="make room, then resume")


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line says; None if it is damaged. Older versions wrote no checksum."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    crc = entry.pop("crc", None)
    return entry if crc in (None, _crc(entry)) else None


def _crc(entry: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry).encode())


def _from_entry(entry: dict[str, Any]) -> Reply:
    tokens = tuple(Token(text=text, alternatives=alternatives) for text, alternatives in entry["tokens"])
    return Reply(status="ok", text=entry["text"], cut=entry["cut"], tokens=tokens, cost=Cost(**entry["cost"]))


def _free(reply: Reply) -> Reply:
    return Reply(status=reply.status, text=reply.text, cut=reply.cut, tokens=reply.tokens)
