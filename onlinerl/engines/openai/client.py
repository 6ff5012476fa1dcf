"""Questions to a server over HTTP: what may pass is asked again, and everything else is said in our words."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from onlinerl.errors import EngineError
from onlinerl.http_client import Connection, Unanswered, pause

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0


class Refused(EngineError):
    """The server answers, and says no."""

    status = 0
    """Of HTTP."""
    said = ""
    """The server's words."""


class Client:
    """Asks one server. Everything runs on one asyncio loop.

    Args:
        root: address of the server, without a path.
        socket: of a server of this machine that listens there instead; `root` is then only a name.
        api_key_env: name of the variable that holds its key.
        timeout_s: longest wait for one answer.
        retries: how often a question is asked again whose failure may pass.
        gone: says why the server will never answer, if that is so.

    Raises:
        EngineError: if there is no such variable.
    """

    def __init__(
        self,
        root: str,
        *,
        socket: str | None = None,
        api_key_env: str | None = None,
        timeout_s: float,
        retries: int,
        gone: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.root, self._timeout_s, self._retries, self._gone = root, timeout_s, retries, gone
        headers: dict[str, str] = {}
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise EngineError(
                    f"the environment variable {api_key_env} is not set where the replica runs",
                    field="engine.api_key_env",
                    fix="set it there (export it before the run or the Ray node is started)",
                )
            headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self._connection = Connection(root, socket=socket, headers=headers, timeout_s=timeout_s)

    async def post(self, path: str, body: Mapping[str, Any], *, retries: int | None = None) -> Any:
        """The answer to a question, as JSON has it.

        Args:
            path: of the endpoint.
            body: what is asked.
            retries: instead of the usual number.

        Raises:
            Refused: if the server says no.
            EngineError: if it says nothing.
        """
        return await self._ask("POST", path, body, self._retries if retries is None else retries)

    async def get(self, path: str, *, retries: int | None = None) -> Any:
        """The same without a body."""
        return await self._ask("GET", path, None, self._retries if retries is None else retries)

    async def close(self) -> None:
        """End all connections."""
        await self._connection.close()

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, retries: int) -> Any:
        for tries in count(1):
            try:
                return await self._connection.ask(method, path, body)
            except Unanswered as trouble:
                if not trouble.may_pass:
                    raise self._error(trouble, path) from None
                if (reason := self._gone()) is not None:
                    raise EngineError(reason, fix="see the end of the Ray logs; then `onlinerl resume`") from None
                if tries > retries:
                    raise self._error(trouble, path) from None
                wait_s = pause(tries, trouble.wait_s, first_s=FIRST_PAUSE_S, longest_s=LONGEST_PAUSE_S)
            await asyncio.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _error(self, trouble: Unanswered, path: str) -> EngineError:
        if trouble.kind == "timeout":
            return EngineError(
                f"{self.root} gave no answer within {self._timeout_s:g} s ({path})",
                field="engine.request_timeout_s",
                fix="raise it if responses are long or the server is loaded; otherwise look at the server's log",
            )
        if trouble.kind == "connection":
            return EngineError(
                f"{self.root} cannot be reached: {trouble.said}",
                field="engine.base_url",
                fix="start the server, or correct the address",
            )
        if trouble.kind == "not_json":
            return EngineError(
                f"{self.root}{path} does not answer in JSON: {trouble.said!r}",
                field="engine.base_url",
                fix="give the address of an OpenAI-compatible server, usually ending in /v1",
            )
        refused = Refused(
            f"{self.root}{path} answered {trouble.status}: {trouble.said}",
            field="engine.base_url",
            fix="look at the server's log",
        )
        refused.status, refused.said = trouble.status, trouble.said
        return refused
