"""Judge with a Python function of your own.

The function gets a list of dicts with the keys `prompt` (str), `messages` (list of {role, content}, empty for plain text),
`responses` (list of K str) and `reference_answer` (str or None). It returns a list with one entry per dict:

- a list of K numbers, higher is better: scores;
- a dict of such lists by name, `score` among them, which is what the run reports; the others are for algorithms that read several;
- a K x K list: cell [i][j] is the probability that response i beats response j, None where not asked, the diagonal is ignored; a
  function that answers like this is never asked about a single response;
- a list of such K x K lists: what the members of an ensemble say, or one judge in several passes. Their mean is the preference, and how
  far they disagree its uncertainty;
- {"scores": K numbers, "members": such a list}: both;
- None: refused to judge.

An entry that is none of these, or that holds NaN or infinity, is a Failure and never reaches training.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr

from onlinerl import registry
from onlinerl.config.paths import at_home
from onlinerl.errors import OracleError
from onlinerl.oracles import _verdicts
from onlinerl.protocols.oracle import Oracle
from onlinerl.types import Cost, Failure, Query, Verdict


class PythonFunction(Oracle):
    """Calls a function given by its file or its dotted path."""

    function: str = Field(
        pattern=r"^(\w+(\.\w+)+|.+\.py:\w+)$", description="FILE.py:FUNCTION or MODULE.FUNCTION", examples=["brevity.py:judge"]
    )
    """File and function, e.g. `brevity.py:judge`: beside the configuration or in the working directory. Or a dotted path, e.g.
    `my_package.my_module.my_function`."""
    revision: str = ""
    """Part of the oracle's version. Change it when something that the function depends on changes; its own file is noticed."""

    _loaded: Callable[[list[dict[str, Any]]], Any] | None = PrivateAttr(None)
    _source_hash: str = PrivateAttr("")

    def located(self, folders: Sequence[Path]) -> PythonFunction:
        """With the absolute path of its file."""
        file, _, name = self.function.rpartition(":")
        places = [folder.absolute() / at_home(file, "oracle.function") for folder in folders if file]
        found = next((place for place in places if place.is_file()), None)
        return self.model_copy(update={"function": f"{found}:{name}"}) if found else self

    def open(self) -> None:
        """Import the function. Idempotent; `judge` calls it too.

        Raises:
            OracleError: if it cannot be imported or called.
        """
        if self._loaded is not None:
            return
        in_file = ":" in self.function
        module_name, _, name = self.function.rpartition(":" if in_file else ".")
        if in_file and not Path(module_name).is_file():
            raise OracleError(
                f"there is no file {Path(module_name).absolute()}",
                field="oracle.function",
                fix="correct the path: it is looked for beside the configuration and in the working directory",
            )
        module = registry.imported(module_name, "oracle.function", OracleError)
        function = getattr(module, name, None)
        if not callable(function):
            problem = f"has no {name!r}" if function is None else f"has {name!r}, which is not a function"
            raise OracleError(f"{module_name} {problem}", field="oracle.function", fix="check the spelling of its name")
        file = getattr(module, "__file__", None)  # None for what is built into Python
        self._source_hash = hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()[:12]
        self._loaded = function

    @property
    def version(self) -> str:
        """Name of the function, hash of the file that defines it, and revision. Where the file lies does not matter."""
        self.open()
        name = Path(self.function).name if ":" in self.function else self.function
        return "-".join(part for part in (name, self._source_hash, self.revision) if part)

    def judge(self, queries: Sequence[Query]) -> list[Verdict | Failure]:
        """One result per query, in order. What the function raises goes through."""
        if not queries:
            return []
        self.open()
        assert self._loaded is not None
        started = time.perf_counter()
        entries = self._loaded([_as_dict(query) for query in queries])
        seconds = (time.perf_counter() - started) / len(queries)
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            message = f"{self.function} returned {type(entries).__name__}, not a list with one entry per prompt"
            return [Failure(kind="parse_fail", message=message) for _ in queries]
        if len(entries) != len(queries):  # no telling which entry belongs to which prompt
            message = f"{self.function} returned {len(entries)} entries for {len(queries)} prompts"
            return [Failure(kind="wrong_length", message=message) for _ in queries]
        return [self._check(query, entry, seconds) for query, entry in zip(queries, entries, strict=True)]

    def _check(self, query: Query, entry: object, seconds: float) -> Verdict | Failure:
        if entry is None:
            return Failure(kind="refused", message=f"{self.function} returned None for prompt {query.prompt.id!r}")
        entry, build = _way(entry)
        result = build(
            entry,
            len(query.responses),
            annotator=self.function,
            oracle_version=self.version,
            cost=Cost(calls=1, seconds=seconds),
        )
        if isinstance(result, Failure):
            return Failure(kind=result.kind, message=f"{self.function}, prompt {query.prompt.id!r}: {result.message}")
        return result


def _as_dict(query: Query) -> dict[str, Any]:
    return {
        "prompt": query.prompt.text,
        "messages": [{"role": message.role, "content": message.content} for message in query.prompt.messages],
        "responses": list(query.responses),
        "reference_answer": query.prompt.reference_answer,
    }


def _way(entry: object) -> tuple[object, Callable[..., Verdict | Failure]]:
    """What is read of an entry, and how."""
    if isinstance(entry, Mapping) and entry.keys() == {"scores", "members"}:
        return entry["members"], partial(_verdicts.from_members, scores=entry["scores"])
    if isinstance(entry, Mapping):
        return entry, _verdicts.from_components
    listed = _plain(entry)
    if not _is_nested(listed):
        return entry, _verdicts.from_scores
    return listed, _verdicts.from_members if _is_nested(_plain(listed[0])) else _verdicts.from_matrix


def _is_nested(entry: object) -> bool:
    listed = _plain(entry)
    return _is_list(listed) and len(listed) > 0 and _is_list(_plain(listed[0]))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
