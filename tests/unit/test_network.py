"""Which interface gloo and NCCL use."""

from __future__ import annotations

import os

import pytest

from onlinerl import network


def test_the_interface_is_that_of_the_route_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever happens to it here
        monkeypatch.delenv(name)

    network.choose_interface("127.0.0.1")

    lo = network.interface_of("127.0.0.1")
    assert lo is not None
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == lo


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=ib0:1")

    network.choose_interface("127.0.0.1")

    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=ib0:1"
