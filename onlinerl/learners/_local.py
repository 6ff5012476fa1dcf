"""One rank in this very process, without a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import TCPStore

from onlinerl.learners._group import RankGroup
from onlinerl.protocols.learner import LearnerConfig, LearnerRank, RankSettings

T = TypeVar("T")
HOST = "127.0.0.1"


class LocalGroup(RankGroup):
    """A learner of one rank, which works in the calling thread.

    Args:
        config: the learner section; it asks for one rank.
        settings: of the rank.

    Raises:
        ConfigError, LearnerError: if the model cannot be loaded.
    """

    def __init__(self, config: LearnerConfig, settings: RankSettings) -> None:
        super().__init__(config, settings.algorithm, settings.model)
        self.names = ["learner rank 0"]
        self._found = dict(os.environ), torch.get_num_threads()
        threads = config.threads or len(os.sched_getaffinity(0))
        os.environ.update(config.environment(settings.device, threads))
        try:
            if settings.device == "cpu":
                torch.set_num_threads(threads)
            timeout = timedelta(seconds=config.start_timeout_s)
            self._store = TCPStore(HOST, 0, is_master=True, timeout=timeout, wait_for_workers=False)
            self._rank: LearnerRank = config.rank(settings, rank=0, store=self._store, address=HOST)
        except BaseException:
            self._restore()
            raise

    @property
    def ranks(self) -> int:
        """One."""
        return 1

    def scatter(
        self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]], timeout_s: float | None = None
    ) -> list[T]:
        """Its answer. Nobody else could notice that it takes too long."""
        return [getattr(self._rank, method.__name__)(*arguments[0])]

    def shutdown(self) -> None:
        """Leave the process group, and the process as it was found: whatever else computes in it goes on as before."""
        self._rank.shutdown()
        self._restore()

    def _restore(self) -> None:
        environment, threads = self._found
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update(environment)
        torch.set_num_threads(threads)
