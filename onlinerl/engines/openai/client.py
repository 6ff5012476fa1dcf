"""Questions to a server over HTTP: what may pass is asked again, and everything else is said in our words."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from onlinerl.errors import EngineError

if TYPE_CHECKING:
    import aiohttp

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
SHOWN = 300
"""Characters of what a server says that are shown."""
PASSING = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})


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
        self.root, self._socket, self._timeout_s, self._retries, self._gone = root, socket, timeout_s, retries, gone
        self._headers: dict[str, str] = {}
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise EngineError(
                    f"the environment variable {api_key_env} is not set where the replica runs",
                    field="engine.api_key_env",
                    fix="set it there (export it before the run or the Ray node is started)",
                )
            self._headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self._session: aiohttp.ClientSession | None = None

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
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, retries: int) -> Any:
        pause = FIRST_PAUSE_S
        for left in range(retries, -1, -1):
            try:
                return await self._once(method, path, body)
            except _MayPass as trouble:
                if (reason := self._gone()) is not None:
                    raise EngineError(reason, fix="see the end of the Ray logs; then `onlinerl resume`") from None
                if left == 0:
                    raise trouble.error from None
                await asyncio.sleep(min(pause if trouble.wait_s is None else trouble.wait_s, LONGEST_PAUSE_S))
                pause *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        import aiohttp

        if self._session is None:
            connector = aiohttp.UnixConnector(self._socket, limit=0) if self._socket else aiohttp.TCPConnector(limit=0)
            timeout = aiohttp.ClientTimeout(total=self._timeout_s)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        try:
            async with self._session.request(method, self.root + path, json=body) as response:
                status, text, retry_after = response.status, await response.text(), response.headers.get("Retry-After")
        except TimeoutError:
            raise _MayPass(
                EngineError(
                    f"{self.root} gave no answer within {self._timeout_s:g} s ({path})",
                    field="engine.request_timeout_s",
                    fix="raise it if responses are long or the server is loaded; otherwise look at the server's log",
                )
            ) from None
        except aiohttp.ClientError as error:
            raise _MayPass(
                EngineError(
                    f"{self.root} cannot be reached: {str(error) or type(error).__name__}",
                    field="engine.base_url",
                    fix="start the server, or correct the address",
                )
            ) from None
        if status in PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise _MayPass(self._refused(status, text), _seconds(retry_after))
        if status >= HTTPStatus.BAD_REQUEST:
            raise self._refused(status, text)
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise EngineError(
                f"{self.root}{path} does not answer in JSON: {text[:SHOWN]!r}",
                field="engine.base_url",
                fix="give the address of an OpenAI-compatible server, usually ending in /v1",
            ) from None

    def _refused(self, status: int, text: str) -> Refused:
        said = _words(text)
        error = Refused(f"{self.root} answered {status}: {said}", field="engine.base_url", fix="look at the server's log")
        error.status, error.said = status, said
        return error


class _MayPass(Exception):
    """A failure after which the same question may be answered."""

    def __init__(self, error: EngineError, wait_s: float | None = None) -> None:
        self.error, self.wait_s = error, wait_s


def _seconds(retry_after: str | None) -> float | None:
    """What a server asks to wait. The other form of the header, a date, counts as not given."""
    try:
        return None if retry_after is None else max(0.0, float(retry_after))
    except ValueError:
        return None


def _words(text: str) -> str:
    """What a server says went wrong, out of the usual shapes of an error."""
    try:
        found = json.loads(text)
    except ValueError:
        return text[:SHOWN]
    error = found.get("error", found) if isinstance(found, Mapping) else found
    said = error.get("message", error) if isinstance(error, Mapping) else error
    return str(said)[:SHOWN]
