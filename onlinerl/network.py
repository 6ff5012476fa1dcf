"""Addresses that other machines can reach."""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil


def local_address(peer: str) -> str:
    """The address of this machine that packets to `peer` leave from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect((peer, 9))
        address: str = probe.getsockname()[0]
        return address


def outside_address() -> str:
    """The address that other machines most likely reach this one at: the one of its default route, else its name."""
    try:
        return local_address("192.0.2.1")  # documentation's own network: never on this side of the route
    except OSError:
        return socket.gethostname()


def interface_of(address: str) -> str | None:
    """Name of the network interface that holds `address`, e.g. "eth0"."""
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    return next((name for name, entries in interfaces.items() if any(entry.address == address for entry in entries)), None)


def choose_interface(peer: str) -> None:
    """Tell gloo and NCCL, in this process, to use the interface that packets to `peer` leave from.

    Their own default is whatever the host name resolves to, often a loopback address. What a user has set stays.
    """
    interface = interface_of(local_address(peer))
    if interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)


def free_port(address: str) -> int:
    """A port that is free on `address` right now. Prefer handing over a bound socket where the other side can take one."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port
