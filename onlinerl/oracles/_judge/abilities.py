"""What a server can do, found out once, before the first question that counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from onlinerl.errors import OracleError
from onlinerl.oracles._judge.endpoint import Endpoint, Reply
from onlinerl.types import Cost

_UNSUPPORTED = ("refused", "parse_fail")


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a server was found to do, once, before the first question."""

    schema: bool
    """Whether it keeps to `response_format: json_schema`."""
    logprobs: bool
    """Whether it gives log-probs of the likeliest tokens."""


PLAIN = Abilities(schema=False, logprobs=False)


async def found(
    endpoint: Endpoint,
    reads: Literal["auto", "logprobs", "text"],
    written: Literal["auto", "json_schema", "text"],
    question: Callable[[Abilities], Mapping[str, Any]],
) -> tuple[Abilities, Cost]:
    """The best of what is wished for that the server does, and what it has cost to find out.

    Args:
        endpoint: of the server.
        reads, written: what is wished for.
        question: a request that makes use of these abilities.

    Raises:
        OracleError: if it cannot be reached, or can do nothing of it.
    """
    schemas = {"auto": (True, False), "json_schema": (True,), "text": (False,)}[written]
    logprobs = {"auto": (True, False), "logprobs": (True,), "text": (False,)}[reads]
    paid, problem = Cost(), ""
    for wished in (Abilities(schema=s, logprobs=p) for p in logprobs for s in schemas):
        if wished == PLAIN:  # every server does that
            return wished, paid
        reply = await endpoint.ask(question(wished))
        paid = paid.plus(reply.cost)
        if reply.status not in ("ok", *_UNSUPPORTED):
            raise OracleError(
                f"{endpoint.root} did not answer a first question ({reply.status}): {reply.text}",
                field="oracle.base_url",
                fix="start the server, or correct the address",
            )
        lacking = _lacks(wished, reply)
        if lacking is None:
            return wished, paid
        problem = lacking
    raise OracleError(
        f"{endpoint.root} cannot do what is asked for: {problem}",
        field="oracle.read_from" if reads == "logprobs" else "oracle.response_format",
        fix="set it to auto or text, or use a server that can, such as vLLM",
    )


def _lacks(wish: Abilities, reply: Reply) -> str | None:
    """What a reply to the first question lacks."""
    if reply.status != "ok":
        return reply.text
    if wish.schema and not reply.text.lstrip().startswith("{"):
        return f"it was asked for JSON by a schema and said {reply.text[:80]!r}"
    if wish.logprobs and not any(token.alternatives for token in reply.tokens):
        return "it gives no log-probs"
    return None
