"""Questions to an OpenAI-compatible chat endpoint: what may pass is asked again, and all of it is counted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal

from onlinerl.budget import LOOK_S, Account
from onlinerl.errors import OracleError
from onlinerl.http_client import Connection, Unanswered, pause
from onlinerl.oracles._judge.own_server import OwnServer
from onlinerl.types import Cost

FIRST_PAUSE_S, LONGEST_PAUSE_S, JITTER = 1.0, 60.0, 0.25
PATH = "/chat/completions"
_STOPS = {
    401: ("oracle.api_key_env", "name the environment variable that holds the server's key, and see that it is the right one"),
    403: ("oracle.api_key_env", "see that this key may use this model"),
    404: ("oracle.model", "correct oracle.model, or oracle.base_url, which usually ends in /v1"),
}
"""Answers after which no other question would go better."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of a reply."""

    text: str
    alternatives: Mapping[str, float]
    """Log-probs of what could have stood there, itself included, as far as the server says."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model said, or why there is nothing."""

    status: Literal["ok", "parse_fail", "timeout", "refused", "error"]
    text: str
    """Of the reply; of a failure, the reason."""
    cut: bool = False
    """Whether it hit the length limit."""
    tokens: tuple[Token, ...] = ()
    """With log-probs, where they were asked for and given."""
    cost: Cost = field(default_factory=Cost)
    """Of all attempts."""


class Endpoint:
    """One server. Everything runs on one asyncio loop.

    Args:
        base_url: up to and with /v1.
        api_key_env: name of the variable that holds its key.
        timeout_s: longest wait for one answer.
        retries: how often a question is asked again whose failure may pass.
        at_once: questions under way at the same time.
        price: dollars for tokens in and out, each per million, and for a request.
        account: which is asked before each attempt.
        own: a server that was started for the judge; `base_url` is then only a name. One that has ended is started again before a question is.

    Raises:
        OracleError: if there is no such variable.
    """

    def __init__(
        self,
        base_url: str,
        api_key_env: str | None,
        *,
        timeout_s: float,
        retries: int,
        at_once: int,
        price: tuple[float, float, float],
        account: Account,
        own: OwnServer | None = None,
    ) -> None:
        headers = {}
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise OracleError(
                    f"the environment variable {api_key_env} is not set",
                    field="oracle.api_key_env",
                    fix="export it before the run is started",
                )
            headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self._own = own
        socket = None if own is None else own.socket
        self._connection = Connection(base_url.rstrip("/"), socket=socket, headers=headers, timeout_s=timeout_s)
        self._timeout_s, self._retries, self._price = timeout_s, retries, price
        self._slots = asyncio.Semaphore(at_once)
        self.account = account

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        """The reply to a chat request; never raises for what concerns this question alone.

        Raises:
            OracleError: if the server would refuse any question: 401, 403, 404; if it was started for the judge, and has ended too often.
            BudgetError: if the account cannot pay for it.
        """
        most = self._most(body)
        chance = random.Random(digest(body))  # the same pauses whenever the same question fails
        paid = Cost()
        for tries in count(1):
            async with self._slots:
                answer, trouble, cost = await self._attempt(body, most)
                paid = paid.plus(cost)
            if trouble is None:
                return _reply(answer, paid)
            if trouble.kind == "status" and trouble.status in _STOPS:
                where, fix = _STOPS[trouble.status]
                raise OracleError(f"{self.root} answered {trouble.status}: {trouble.said}", field=where, fix=fix)
            if not trouble.may_pass or tries > self._retries:
                return self._failed(trouble, paid)
            if self._own is not None and trouble.kind == "connection":
                await self._own.up()
            spread = JITTER * chance.random()
            await asyncio.sleep(pause(tries, trouble.wait_s, first_s=FIRST_PAUSE_S, longest_s=LONGEST_PAUSE_S, jitter=spread))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, body: Mapping[str, Any], most: Cost) -> tuple[Any, Unanswered | None, Cost]:
        while not self.account.reserve(most):
            await asyncio.sleep(LOOK_S)
        started, answer, trouble = time.perf_counter(), None, None
        try:
            answer = await self._connection.ask("POST", PATH, body)
        except Unanswered as error:
            trouble = error
        finally:  # one that is cancelled was sent
            cost = self._cost(answer, time.perf_counter() - started)
            self.account.settle(most, cost)
        return answer, trouble, cost

    def _most(self, body: Mapping[str, Any]) -> Cost:
        """No tokenizer makes more tokens of a text than it has bytes."""
        written = int(body["max_tokens"])
        return self._priced(len(json.dumps(body)), written, answered=True)

    @property
    def root(self) -> str:
        """Its address."""
        return self._connection.root

    async def close(self) -> None:
        """End all connections."""
        await self._connection.close()

    def _failed(self, trouble: Unanswered, paid: Cost) -> Reply:
        if trouble.kind == "timeout":
            return Reply(status="timeout", text=f"no answer within {self._timeout_s:g} s", cost=paid)
        if trouble.kind == "not_json":
            return Reply(status="parse_fail", text=f"the server does not answer in JSON: {trouble.said!r}", cost=paid)
        refused = trouble.kind == "status" and not trouble.may_pass
        return Reply(status="refused" if refused else "error", text=str(trouble), cost=paid)

    def _cost(self, answer: Any, seconds: float) -> Cost:
        usage = answer.get("usage") if isinstance(answer, Mapping) else None
        read, written = (_whole(usage, name) for name in ("prompt_tokens", "completion_tokens"))
        return replace(self._priced(read, written, answered=answer is not None), seconds=seconds)

    def _priced(self, read: int, written: int, *, answered: bool) -> Cost:
        usd = (read * self._price[0] + written * self._price[1]) / 1e6 + self._price[2] * answered
        return Cost(calls=1, usd=usd, tokens=read + written, tokens_out=written)


def digest(body: Mapping[str, Any]) -> str:
    """By which a question is recognised: the model, every word of it, and how it is to be answered."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _whole(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _reply(answer: Any, paid: Cost) -> Reply:
    """What a chat completion says."""
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    text = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(text, str) or not isinstance(choice, Mapping):
        said = message.get("refusal") if isinstance(message, Mapping) else None
        if isinstance(said, str):
            return Reply(status="refused", text=said, cost=paid)
        return Reply(status="parse_fail", text="the server's answer holds no text", cost=paid)
    return Reply(status="ok", text=text, cut=choice.get("finish_reason") == "length", tokens=_tokens(choice), cost=paid)


def _tokens(choice: Mapping[str, Any]) -> tuple[Token, ...]:
    given = choice.get("logprobs")
    listed = given.get("content") if isinstance(given, Mapping) else None
    found = []
    for one in listed if isinstance(listed, list) else []:
        if not isinstance(one, Mapping) or not isinstance(one.get("token"), str):
            return ()
        top = one.get("top_logprobs")
        named = {
            each["token"]: float(each["logprob"])
            for each in (one, *(top if isinstance(top, list) else ()))
            if isinstance(each, Mapping) and isinstance(each.get("token"), str) and _is_number(each.get("logprob"))
        }
        found.append(Token(text=one["token"], alternatives=named))
    return tuple(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
