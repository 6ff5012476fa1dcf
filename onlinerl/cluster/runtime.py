"""Joining or starting a Ray cluster, and asking it for room."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any, Literal

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from onlinerl.cluster import _reaper
from onlinerl.config import RunConfig
from onlinerl.config.reward_model import RewardConfig
from onlinerl.errors import ClusterError, OnlineRLError
from onlinerl.placement import Placement, bundles, explain_missing, explain_unplaceable, plan

OBJECT_STORE_BYTES = 256 * 2**20
LOOK_S = 0.5
"""Between two looks at something else, while an answer is waited for."""


class Cluster:
    """A Ray cluster for the time of one run, or of several with the same layout; use as a context manager."""

    def __init__(self, config: RunConfig | RewardConfig) -> None:
        self._config = config
        self._group: PlacementGroup | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self.device: Literal["cpu", "cuda"] = "cpu"
        self.logs = ""
        """Folder of Ray's logs, and of everything that engine, learner and oracle print, on each machine of the cluster."""
        self.placements: list[Placement] = []

    def __enter__(self) -> Cluster:
        self._connect()
        try:
            self.device = self._device()
            self.placements = plan(self._config, self.device)
            self._reserve()
        except RayError as error:
            self.__exit__()
            raise ClusterError(
                f"Ray failed while room was reserved: {_said(error)}", field="cluster", fix="see `ray status` and the Ray logs"
            ) from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def share_cores(self) -> bool:
        """Whether a replica and a rank would compute on the same cores at the same time, as CPU parts of one machine do by default."""
        if isinstance(self._config, RewardConfig):  # there is no engine
            return False
        ranks, replicas = self._config.learner.ranks, self._config.engine.replicas
        if self.device != "cpu" or (self._config.engine.threads and self._config.learner.threads):
            return False
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        return not {nodes[i] for i in range(ranks)}.isdisjoint(nodes[ranks + i] for i in range(replicas))

    def __exit__(self, *exc: object) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        ray.shutdown()
        if self._reaper is not None:
            self._reaper.terminate()
            self._reaper.wait()
            self._reaper = None

    def _connect(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Engine and learner are the work. Ray gives its workers 15, with which whatever else computes on the machine goes before them.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray starts a worker for each core beforehand. Our actors have environments of their own and take none of those.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        address = self._config.cluster.address
        handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        where, limit = address or "this machine", self._config.cluster.start_timeout_s
        try:
            with _deadline(limit):
                if address is None:
                    # Ray's ports are open on all interfaces, and it asks for a token on them. Left to itself it would put one that
                    # all its clusters share into a file that everybody can read; this one ends with the run.
                    if not os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
                        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
                    with _in_a_group_of_their_own():
                        context = ray.init(
                            address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet
                        )
                    self._reaper = _reaper.start(os.getpid())
                else:
                    context = ray.init(address=address, namespace="onlinerl", **quiet)
                self.logs = os.path.join(context.address_info["session_dir"], "logs")
        except SystemExit:  # of the handler for SIGTERM that Ray has while it starts
            ray.shutdown()
            raise KeyboardInterrupt from None
        except _Late:
            ray.shutdown()
            raise ClusterError(
                f"Ray at {where} did not answer within {limit:g} s",
                field="cluster.start_timeout_s",
                fix="look at `ray status` and the network between the machines; raise the limit if it is only slow",
            ) from None
        except (RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"cannot reach or start a Ray cluster at {where}: {_said(error)}",
                field="cluster.address",
                fix="start one (launchers/ray/head.sh), correct the address, use the RAY_AUTH_MODE and RAY_AUTH_TOKEN it was started "
                "with, or leave cluster.address out to run on this machine alone",
            ) from error
        finally:
            for each, handler in handlers.items():  # Ray installs its own, which would end the run without a clean-up
                signal.signal(each, handler)

    def _device(self) -> Literal["cpu", "cuda"]:
        wanted = self._config.cluster.device
        deadline = time.monotonic() + self._config.cluster.wait_s
        while not (gpus := ray.cluster_resources().get("GPU", 0)) and wanted == "cuda":
            if self._config.cluster.address is not None and time.monotonic() < deadline:
                time.sleep(1)  # nodes may still be joining
                continue
            raise ClusterError(
                "the cluster has no GPU", field="cluster.device", fix="set cluster.device=cpu, or add a GPU node"
            )
        return wanted if wanted != "auto" else ("cuda" if gpus else "cpu")

    def _reserve(self) -> None:
        deadline = time.monotonic() + self._config.cluster.wait_s
        # An existing cluster may still be growing; one that was started here will not.
        while (error := self._too_small()) is not None:
            if self._config.cluster.address is None or time.monotonic() > deadline:
                raise error
            time.sleep(1)
        self._group = placement_group(bundles(self.placements), strategy="PACK")
        ready, _ = ray.wait([self._group.ready()], timeout=max(self._config.cluster.wait_s, 10))
        if not ready:
            free = {k: v for k, v in ray.available_resources().items() if k in {"CPU", "GPU"} or not k.startswith("node:")}
            raise ClusterError(
                f"the cluster is big enough but not free: available now are {free}",
                field="cluster",
                fix="wait for other jobs, or stop what is left over (`ray status`, `ray list actors`)",
            )

    def _too_small(self) -> ClusterError | None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return explain_missing(self.placements, ray.cluster_resources()) or explain_unplaceable(self.placements, nodes)

    def options(self, index: int, env: Mapping[str, str], **more: Any) -> dict[str, Any]:
        """Ray actor options for the placement at `index`."""
        return self._options(self.placements[index], self._group, self.placements[index].bundle, env, more)

    def reserve_like(self, index: int) -> PlacementGroup:
        """Room for one more actor like the one at `index`, in a group of its own.

        Raises:
            ClusterError: if there is none.
        """
        placement = replace(self.placements[index], bundle=0)
        group = placement_group(bundles([placement]))
        ready, _ = ray.wait([group.ready()], timeout=max(self._config.cluster.wait_s, 10))
        if not ready:
            remove_placement_group(group)
            free = {k: v for k, v in ray.available_resources().items() if k in {"CPU", "GPU"} or not k.startswith("node:")}
            raise ClusterError(
                f"one more needs {bundles([placement])[0]}, and available are {free}",
                field="cluster",
                fix="add a node, or lower engine.cpus",
            )
        return group

    def options_in(self, group: PlacementGroup, index: int, env: Mapping[str, str], **more: Any) -> dict[str, Any]:
        """The same for an actor like the one at `index`, in a room that `reserve_like` has given."""
        return self._options(self.placements[index], group, 0, env, more)

    def release(self, group: PlacementGroup) -> None:
        """Give a room back."""
        remove_placement_group(group)

    @staticmethod
    def _options(
        placement: Placement, group: PlacementGroup | None, bundle: int, env: Mapping[str, str], more: Mapping[str, Any]
    ) -> dict[str, Any]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "num_cpus": placement.cpus,
            "num_gpus": placement.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            "runtime_env": {"env_vars": dict(env)},
            "max_restarts": 0,
            **more,
        }


class _Late(BaseException):
    """The deadline passed. Not an Exception: Ray tries again after any of those, some of its waits for a quarter of an hour."""


@contextmanager
def _in_a_group_of_their_own() -> Iterator[None]:
    """Processes that Ray starts inside are not reached by a SIGTERM to the controller's process group, as `timeout` and batch systems
    send it: the clean-up needs them, and Ray aborts a process that has lost its control service. (Ray shields them from SIGINT itself.)"""
    from ray._private import services

    usual = services.ConsolePopen
    services.ConsolePopen = partial(usual, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = usual


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise `_Late` when the block takes longer. A wait inside Ray's own C++ code is cut off when it returns, after 40 s at most."""

    def late(number: int, frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _said(error: Exception) -> str:
    """Kind and first line of an error; Ray's go on for pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def explained(
    failure: RayError, role: str, what: str, error: type[OnlineRLError], lost: type[OnlineRLError] | None = None
) -> OnlineRLError:
    """What Ray says about a failed call, as an error of the role that was called, with that role's own error in the message.

    Args:
        failure: what Ray raised.
        role: who was called, for the message; may be empty.
        what: what was being done.
        error: the boundary's exception.
        lost: the one to take if the process is gone, where that is not the same.
    """
    where = f"{role}: " if role else ""
    if isinstance(failure, RayTaskError):
        cause = failure.cause
        if isinstance(cause, OnlineRLError):
            return type(cause)(f"{where}{cause.cause}", field=cause.field, fix=cause.fix)
        return error(f"{where}{what} failed: {type(cause).__name__}: {cause}", fix="the traceback is below, or in the Ray logs")
    if isinstance(failure, RayActorError):
        return (lost or error)(
            f"{where}its process died during {what}: {failure}",
            fix="often out of memory: see the end of the Ray logs; then `onlinerl resume`",
        )
    memory = isinstance(failure, OutOfMemoryError)
    return error(
        f"{where}{what} failed in the cluster: {_said(failure)}",
        fix="give that machine more memory or this run less (engine.kv_cache_gib, learner.tokens_per_microbatch), then resume"
        if memory
        else "see `ray status` and the Ray logs for a node or process that was lost, then `onlinerl resume`",
    )


def get(
    refs: Any,
    *,
    timeout_s: float,
    error: type[OnlineRLError],
    what: str,
    lost: type[OnlineRLError] | None = None,
    late: type[OnlineRLError] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Any:
    """`ray.get` with a deadline, and with the failing role's own error in the message.

    Args:
        refs: one reference, or a mapping from role name to reference.
        timeout_s: for all of them together.
        error: the boundary's exception.
        what: what was being done, for the message.
        lost: the exception to raise if a process is gone, where that is not `error`.
        late: the one to raise at the deadline, where that is not `error`.
        meanwhile: called every `LOOK_S`; what it raises ends the waiting.

    Raises:
        OnlineRLError: of type `error`, naming the role, what it was doing and its own error.
    """
    named = refs if isinstance(refs, Mapping) else {"": refs}
    deadline = time.monotonic() + timeout_s
    roles = {ref: role for role, ref in named.items()}
    waiting = list(roles)
    results = {}
    while waiting:
        # In the order of arrival: the first failure is the cause, and what others are still waiting for may be its consequence.
        left = max(0.0, deadline - time.monotonic())
        done, waiting = ray.wait(waiting, timeout=left if meanwhile is None else min(left, LOOK_S))
        if meanwhile is not None:
            meanwhile()
            if not done and left > LOOK_S:
                continue
        if not done:
            silent = ", ".join(filter(None, (roles[ref] for ref in waiting)))
            raise (late or error)(
                f"{silent}{': ' if silent else ''}{what} did not finish within {timeout_s:.0f} s",
                fix="look for a stuck or overloaded process on that node",
            )
        role = roles[done[0]]
        try:
            results[role] = ray.get(done[0])
        except RayError as failure:
            raise explained(failure, role, what, error, lost) from failure
    return [results[role] for role in named] if isinstance(refs, Mapping) else results[""]
