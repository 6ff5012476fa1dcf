"""A learner of one rank in the calling process."""

import os
from types import SimpleNamespace

import pytest
import torch

from onlinerl.errors import LearnerError
from onlinerl.learners._local import LocalGroup


def failing(settings, *, rank, store, address):
    raise LearnerError("the model is not there")


def test_a_rank_that_does_not_start_leaves_the_process_as_it_was(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    config = SimpleNamespace(
        dtype="float32",
        threads=threads + 1,
        start_timeout_s=10,
        environment=lambda device, threads: {"OMP_NUM_THREADS": str(threads), "ONLY_OF_THE_RANK": "1"},
        rank=failing,
    )
    before = dict(os.environ)
    with pytest.raises(LearnerError, match="not there"):
        LocalGroup(config, SimpleNamespace(algorithm=None, model="", device="cpu"))
    assert dict(os.environ) == before
    assert torch.get_num_threads() == threads
