"""Runs one program that a model wrote, with nothing but a folder of its own. Started by code_verifier.py, never imported.

It reads {"program", "setup", "calls", "stdin", "limits", "required"} from stdin. The first line that it writes says what isolates the
program: {"network": bool, "files": bool, "processes": bool}; where all are required and one is missing, it ends there. Then, with `calls`,
{"i": number, "value": text} or {"i": number, "error": text} for each expression; without, what the program itself writes.

What the program is to be compared with is not here: whoever started this process has it and compares. So a program may lie about what
its functions return, end early or end well; it does not know what would have been right.

On Linux. As root the program gets a user id that nobody else has; otherwise it gets a user namespace.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
import sys
from typing import Any

CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
CAP_DAC_READ_SEARCH = 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on every architecture
READS = 0b1101  # execute, read a file, read a folder
BITS = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights to files a version of Landlock knows; 16 from the fifth on."""
OF_FILES = 0b1 | 0b10 | 0b100 | 1 << 14 | 1 << 15
"""Those that a file, which is no folder, may have."""
OWN_UIDS = 0x70000000

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Isolate, say how, run, and say what came of it."""
    request = json.loads(sys.stdin.buffer.read())
    answers = os.dup(1)
    uid = OWN_UIDS + os.getpid() if os.geteuid() == 0 else None
    own_network = unshared(uid)
    if own_network:
        child = os.fork()  # the first process of its namespace: when it ends, the kernel ends all others there
        if child:
            # Whoever ends the program asks for it here: only after its first process are all the others gone.
            signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
            os.waitpid(child, 0)
            return
    limited(request["limits"])
    if uid is not None:
        os.chown(".", uid, uid)
    own_user = uid is not None and without_rights(uid)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # another user would have undone it
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    said = {"network": own_network, "files": own_files(), "processes": own_network and (own_user or uid is None)}
    most = request["limits"]["processes"] + (
        uid is None
    )  # the process outside is of the same user, unless the program has its own
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    tell(answers, said)
    if request["required"] and not all(said.values()):
        return
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 2)
    if request["calls"] is None:
        os.close(answers)
        script(request)
    else:
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        calls(request, answers)


def tell(answers: int, said: dict[str, Any]) -> None:
    """One line."""
    data = json.dumps(said).encode() + b"\n"
    while data:
        data = data[os.write(answers, data) :]


# --- isolation ---


def unshared(uid: int | None) -> bool:
    """Whether the next process has no network but its own, which leads nowhere, and sees no other processes."""
    user, group = os.getuid(), os.getgid()
    spaces = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | (CLONE_NEWUSER if uid is None else 0)
    if libc.unshare(spaces) != 0:
        return False
    if uid is None:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            try:
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            except OSError:
                return False
    return True


def limited(limits: dict[str, int]) -> None:
    """What the program may use up, each of its processes for itself."""
    for kind, most in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def without_rights(uid: int) -> bool:
    """Become that user, who owns nothing but this folder. Root's right to read is kept, because Python itself may lie where nobody else
    may look; which files can be read is not up to it but to `own_files`."""
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError:  # in a container that has no such user
        return False
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    rights = (ctypes.c_uint32 * 6)(1 << CAP_DAC_READ_SEARCH, 1 << CAP_DAC_READ_SEARCH, 0, 0, 0, 0)
    return bool(libc.capset(header, rights) == 0)


def own_files() -> bool:
    """Whether from now on this folder can be written to, Python and its libraries can be read, and no other file is there (Landlock)."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    every = (1 << BITS.get(version, 16)) - 1
    # Rights to files, to TCP, and from the sixth version on to sockets and signals outside.
    handled = [every, *([0b11] if version >= 4 else []), *([0b11] if version >= 6 else [])]
    attributes = (ctypes.c_uint64 * len(handled))(*handled)
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(8 * len(handled)), 0)
    if rules < 0:
        return False
    libraries = {sys.prefix, sys.base_prefix, sys.exec_prefix, *filter(os.path.isabs, sys.path)}
    allowed = {path: READS for path in (*libraries, "/usr", "/lib", "/lib64", "/etc")}
    allowed |= {"/dev/null": every, "/dev/zero": every, "/dev/urandom": READS, "/dev/random": READS, os.getcwd(): every}
    for path, rights in allowed.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        kept = rights & every & (-1 if os.path.isdir(path) else OF_FILES)
        rule = kept.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
        done = libc.syscall(LANDLOCK_ADD_RULE, rules, 1, ctypes.create_string_buffer(rule, len(rule)), 0)
        os.close(place)
        if done != 0:
            return False
    return bool(libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0) == 0)


# --- the program ---


def script(request: dict[str, Any]) -> None:
    """As if it had been started as a program: it reads its stdin and writes to stdout."""
    with open("stdin", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(request["stdin"])
    os.dup2(os.open("stdin", os.O_RDONLY), 0)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8", errors="replace")
    try:
        exec(compile(request["program"], "program.py", "exec"), {"__name__": "__main__"})
    except BaseException:  # noqa: BLE001  (what it has written counts)
        pass
    finally:
        sys.stdout.flush()


def calls(request: dict[str, Any], answers: int) -> None:
    """Its functions are called, one expression after the other."""
    names: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(request["program"], "program.py", "exec"), names)
        exec(compile(request["setup"], "tests.py", "exec"), names)
    except BaseException as error:  # noqa: BLE001  (a program may raise anything)
        tell(answers, {"i": -1, "error": shown(error)})
        return
    for i, expression in enumerate(request["calls"]):
        try:
            said = {"i": i, "value": plain(eval(compile(expression, "tests.py", "eval"), names))}
        except BaseException as error:  # noqa: BLE001
            said = {"i": i, "error": shown(error)}
        tell(answers, said)


def plain(value: Any, depth: int = 0) -> str:
    """The value as Python writes it, if it is made of Python's own types, or of types that are made of them."""
    if depth > 40:
        raise ValueError("nested too deeply")
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(plain(each, depth + 1) for each in list.__iter__(value)) + "]"
    if isinstance(value, tuple):
        inside = [plain(each, depth + 1) for each in tuple.__iter__(value)]
        return "(" + ", ".join(inside) + ("," if len(inside) == 1 else "") + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{plain(k, depth + 1)}: {plain(v, depth + 1)}" for k, v in dict.items(value)) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(plain(each, depth + 1) for each in value) + "}" if value else "set()"
    raise TypeError(f"a {type(value).__name__} is no plain value")


def shown(error: BaseException) -> str:
    """For people."""
    return f"{type(error).__name__}: {error}"[:200]


if __name__ == "__main__":
    main()
