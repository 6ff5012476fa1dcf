"""One question to a server over HTTP, and what its failure means. Whoever asks decides how often to ask again, and in whose words to say it."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import aiohttp

SHOWN = 300
"""Characters of what a server says that are shown."""
PASSING = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})


def installed() -> bool:
    """Whether the library is there that this needs, aiohttp."""
    return importlib.util.find_spec("aiohttp") is not None


class Unanswered(Exception):
    """A question that got no answer."""

    def __init__(
        self,
        kind: Literal["timeout", "connection", "status", "not_json"],
        said: str,
        *,
        status: int = 0,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(f"HTTP {status}: {said}" if kind == "status" else said or kind)
        self.kind, self.said, self.status, self.wait_s = kind, said, status, wait_s
        """`said`: the server's words, or the library's; `wait_s`: how long the server asked to be left alone."""

    @property
    def may_pass(self) -> bool:
        """Whether the same question may be answered a little later."""
        if self.kind == "status":
            return self.status in PASSING or self.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        return self.kind != "not_json"


class Connection:
    """To one server. Everything runs on one asyncio loop.

    Args:
        root: address of the server; paths are appended to it.
        socket: of a server of this machine that listens there instead; `root` is then only a name.
        headers: of every question.
        timeout_s: longest wait for one answer.
    """

    def __init__(self, root: str, *, socket: str | None = None, headers: Mapping[str, str], timeout_s: float) -> None:
        self.root, self._socket, self._headers, self._timeout_s = root, socket, dict(headers), timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """The answer, as JSON has it; None if it is empty.

        Raises:
            Unanswered: if there is none.
        """
        import aiohttp

        if self._session is None:
            connector = aiohttp.UnixConnector(self._socket, limit=0) if self._socket else aiohttp.TCPConnector(limit=0)
            timeout = aiohttp.ClientTimeout(total=self._timeout_s)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        try:
            async with self._session.request(method, self.root + path, json=body) as response:
                status, data, retry_after = response.status, await response.read(), response.headers.get("Retry-After")
        except TimeoutError:
            raise Unanswered("timeout", "") from None
        except aiohttp.ClientError as error:
            raise Unanswered("connection", str(error) or type(error).__name__) from None
        text = data.decode(errors="replace")
        if status >= HTTPStatus.BAD_REQUEST:
            raise Unanswered("status", words(text), status=status, wait_s=seconds(retry_after))
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise Unanswered("not_json", text[:SHOWN]) from None

    async def close(self) -> None:
        """End all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


def pause(tries: int, wait_s: float | None, *, first_s: float, longest_s: float, jitter: float = 0.0) -> float:
    """Seconds until a question that failed `tries` times is asked again: what the server asked for, else twice as long each time.

    Args:
        tries: from 1.
        wait_s: what the server asked for.
        first_s, longest_s: bounds.
        jitter: in [0, 1), by which share it is longer, so that many who failed together do not come back together.
    """
    return min(first_s * 2 ** (tries - 1) if wait_s is None else wait_s, longest_s) * (1 + jitter)


def seconds(retry_after: str | None) -> float | None:
    """What a Retry-After header asks to wait, in either of its two forms; None if it says nothing, or a date that has passed."""
    if retry_after is None:
        return None
    try:
        plain = str(retry_after).strip()
        if plain.isdigit():
            return float(plain)
        found = parsedate_to_datetime(plain).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return found if found > 0 else None  # the clocks of two machines differ


def words(text: str) -> str:
    """What a server says went wrong, out of the usual shapes of an error."""
    try:
        found = json.loads(text)
    except ValueError:
        return text[:SHOWN]
    error = found.get("error", found) if isinstance(found, Mapping) else found
    said = error.get("message", error) if isinstance(error, Mapping) else error
    return str(said)[:SHOWN]
