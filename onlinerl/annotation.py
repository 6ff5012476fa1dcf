"""What `onlinerl people` does: the page for the people whom a run asks, and what they have said as a file."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from onlinerl import config as configuration
from onlinerl import resuming
from onlinerl.errors import ConfigError, StoreError
from onlinerl.people import export as exported
from onlinerl.people.agreement import agreement, gold_accuracy
from onlinerl.people.queue import QUESTIONS, Queue
from onlinerl.people.server import Server
from onlinerl.protocols.oracle import Oracle
from onlinerl.stores import labels

TOKEN_ENV = "ONLINERL_PEOPLE_TOKEN"
TOKEN_FILE = Path("~/.onlinerl/people_token")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,}")


def queue(run: Path) -> Queue:
    """Of a run whose oracle asks people, perhaps inside another one; or the folder of a queue.

    Raises:
        StoreError: if there is no such run, or its files are damaged.
        ConfigError: if its oracle asks nobody, or several do.
    """
    if (run / QUESTIONS).exists():
        return Queue(run)
    if not (run / "config.yaml").exists():
        raise StoreError(f"{run} holds no run", field="run", fix="name a run directory, e.g. runs/quickstart")
    found = list(_folders(configuration.oracle(resuming.stored_config(run.absolute(), ())), run / labels.KEPT))
    if len(found) != 1:
        told = f"ask people: {', '.join(map(str, found))}" if found else "and nobody else is asked"
        fix = "name the folder of one" if found else "start a run with oracle.name=human"
        raise ConfigError(f"of {run} is not one that asks people: {len(found)} {told}", field="oracle.name", fix=fix)
    return Queue(found[0])


def _folders(oracle: Oracle, folder: Path) -> Iterator[Path]:
    """Where each oracle that asks people keeps its queue, as `Container.remember` hands folders on."""
    if oracle.asks_people:
        yield folder
    for key, each in oracle.inner().items():
        yield from _folders(each, folder / key)


def token() -> str:
    """Of this user: what the environment says, or a file that only they can read, made when it is missing.

    Raises:
        ConfigError: if it is too short for a secret.
        StoreError: if the file cannot be read or made.
    """
    given = os.environ.get(TOKEN_ENV)
    path = TOKEN_FILE.expanduser()
    try:
        found = given if given is not None else _kept(path)
    except OSError as error:
        fix = f"make it writable, or set {TOKEN_ENV}"
        raise StoreError(f"{path} cannot be read or made: {error}", field="token", fix=fix) from error
    if not _TOKEN.fullmatch(found):
        raise ConfigError(
            "is not 16 or more letters and digits",
            field=TOKEN_ENV if given is not None else str(path),
            fix="python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one",
        )
    return found


def _kept(path: Path) -> str:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        made = secrets.token_urlsafe(32)
        new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(made)
        try:
            os.link(new, path)  # whole when it is there at all, and never in place of another one
        finally:
            new.unlink()
    except FileExistsError:
        path.chmod(0o600)
    return path.read_text().strip()


def serve(run: Path, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve the page until the process is stopped.

    Args:
        run: see `queue`.
        host: address to listen at.
        port: 0 takes a free one.
        tell: is told where the page is.

    Raises:
        StoreError: see `queue`.
        ConfigError: the same; or if the address cannot be had.
    """
    found, secret = queue(run), token()
    found.look()
    try:
        server = Server((host, port), found, secret)
    except OSError as error:
        raise ConfigError(f"cannot be had: {error}", field=f"{host}:{port}", fix="choose another --host or --port") from error
    with server:
        if not _is_loopback(host):
            tell(
                f"{host} can be reached by others: whoever has the link may answer, and it travels unencrypted. "
                f"Without --host, and with `ssh -L {port}:127.0.0.1:{port}` from where people sit, it does not"
            )
        tell(f"people answer at http://{_written(host)}:{server.server_address[1]}/#token={secret}")
        tell("Ctrl-C stops the page, not the run; what was answered is kept")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            tell("stopped")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _written(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def summary(run: Path) -> dict[str, Any]:
    """How many questions there are, and how far people agree, as plain JSON.

    Raises:
        StoreError: see `queue`.
        ConfigError: the same.
    """
    found = queue(run)
    found.look()
    answers = [found.answers(one.id) for one in found.questions()]
    agreed = agreement(answers)
    return {
        "questions": len(answers),
        "open": len(found.open()),
        "answered": sum(map(bool, answers)),
        "late": sum(any(answer.late for answer in said) for said in answers),
        "annotators": sorted({answer.annotator for said in answers for answer in said}),
        "agreement": {"share": agreed.share, "kappa": agreed.kappa, "answers": agreed.answers},
        "gold_accuracy": {who: {"share": one.share, "answers": one.answers} for who, one in gold_accuracy(found).items()},
    }


def export(run: Path, file: Path) -> int:
    """Write what people have decided as JSON lines; returns how many comparisons.

    Raises:
        StoreError: see `queue`; or if the file cannot be written.
        ConfigError: see `queue`.
    """
    rows = exported.rows(queue(run))
    try:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise StoreError(f"{file} cannot be written: {error}", field="export", fix="correct the path, or make room") from error
    return len(rows)
