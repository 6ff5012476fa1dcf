"""What every transport says of itself, found by name, and which of them a layout gets."""

from __future__ import annotations

import inspect
from itertools import product

import pytest

from onlinerl import registry
from onlinerl.config.roles import ROLES, build
from onlinerl.errors import ConfigError
from onlinerl.protocols.transport import Layout, Sender, TransportConfig

NAMES = registry.names(ROLES["sync"].folder)
LAYOUTS = [
    Layout(device=device, colocated=colocated, joins=joins)
    for device, colocated, joins in product(("cpu", "cuda", None), (False, True), (False, True))
    if not (device == "cpu" and colocated)
]


def named(name: str, **keys: object) -> TransportConfig:
    return build({"backend": name, **keys}, "sync")


def goes_with(transport: TransportConfig, layout: Layout) -> bool:
    try:
        transport.check(layout)
    except ConfigError:
        return False
    return True


def test_what_is_there_is_found():
    assert {"auto", "disk", "gloo", "ipc", "nccl"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_chooses_it_and_it_knows_its_name(name):
    transport = named(name, timeout_s=5.0, tensors_checked=2, canary_tolerance_nats=0.5)
    assert transport.backend == type(transport)().backend == name
    assert (transport.timeout_s, transport.tensors_checked, transport.canary_tolerance_nats) == (5.0, 2, 0.5)
    assert (inspect.getdoc(type(transport)) or "").endswith(".")
    with pytest.raises(ConfigError, match=r"sync.bucket: is not a known key"):
        named(name, bucket=1)


@pytest.mark.parametrize("name", NAMES)
def test_it_sends_or_chooses_one_that_sends(name):
    transport = named(name)
    resolved = {type(transport.resolve(layout)) for layout in LAYOUTS if goes_with(transport, layout)}
    assert resolved
    for cls in resolved:
        assert cls.sender is not TransportConfig.sender
        assert cls.receiver is not None or "bucket_mib" not in cls.model_fields, "files have no buckets"


REFUSED = [(name, layout) for name in NAMES for layout in LAYOUTS if not goes_with(named(name), layout)]


@pytest.mark.parametrize(("name", "layout"), REFUSED, ids=str)
def test_what_does_not_go_together_is_refused_by_field_cause_and_fix(name, layout):
    with pytest.raises(ConfigError, match=r"sync.backend: ") as error:
        named(name).check(layout)
    assert error.value.fix


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("gloo", {("cpu", False), ("cuda", False)}),
        ("nccl", {("cuda", False)}),
        ("ipc", {("cuda", True)}),
        ("disk", {("cpu", False), ("cuda", False)}),
        ("auto", {("cpu", False), ("cuda", False), ("cuda", True)}),
    ],
)
def test_which_layouts_it_goes_with(name, accepted):
    transport = named(name)
    joining = [layout for layout in LAYOUTS if layout.joins and layout.device is not None]
    assert {(each.device, each.colocated) for each in joining if goes_with(transport, each)} == accepted


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_that_cannot_join_gets_files(name):
    layout = Layout(device="cpu", colocated=False, joins=False)
    transport = named(name)
    if goes_with(transport, layout):
        assert transport.resolve(layout).receiver is None
    else:
        assert transport.receiver is not None


@pytest.mark.parametrize(
    ("device", "colocated", "joins", "chosen"),
    [
        ("cpu", False, True, "gloo"),
        ("cuda", False, True, "nccl"),
        ("cuda", True, True, "ipc"),
        ("cpu", False, False, "disk"),
        ("cuda", False, False, "disk"),
    ],
)
def test_auto_takes_the_best_and_hands_its_keys_on(device, colocated, joins, chosen):
    layout = Layout(device=device, colocated=colocated, joins=joins)
    found = named("auto", timeout_s=7.0).resolve(layout)
    assert (found.backend, found.timeout_s) == (chosen, 7.0)
    if joins:
        assert named("auto", bucket_mib=3).resolve(layout).model_dump()["bucket_mib"] == 3
    else:
        with pytest.raises(ConfigError, match=r"sync.bucket_mib: is 3, and disk, which is chosen here, would not read it"):
            named("auto", bucket_mib=3).resolve(layout)


def test_auto_says_where_nothing_goes():
    with pytest.raises(ConfigError, match="none of the transports"):
        named("auto").check(Layout(device="cuda", colocated=True, joins=False))


def test_a_name_that_is_not_there():
    with pytest.raises(ConfigError, match=r"sync.backend: there is no 'glo'") as error:
        named("glo")
    assert "did you mean 'gloo'?" in str(error.value.fix)
    with pytest.raises(ConfigError, match=r"sync.backened: is not a known key") as error:
        build({"backened": "gloo"}, "sync")
    assert error.value.fix == "did you mean 'backend'?"


def test_one_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "pigeon.py").write_text(
        "from onlinerl.protocols.transport import TransportConfig\n\n\n"
        'class Pigeon(TransportConfig):\n    """By bird."""\n\n    birds: int = 1\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = named("pigeon.Pigeon", birds=3)
    assert (found.backend, found.model_dump()["birds"]) == ("pigeon.Pigeon", 3)
    assert Sender  # what its `sender` returns


def test_disk_tells_the_replicas_where_the_weights_are():
    """Once, by rank 0, with what they are rounded to."""
    from onlinerl.protocols.transport import Meeting

    class Replicas:
        def __init__(self):
            self.calls = []

        def load_weights(self, *args):
            self.calls.append(args)

    replicas = Replicas()
    for rank in range(2):
        meeting = Meeting(rank=rank, address="127.0.0.1", workers=1, dtypes=("float32", "bfloat16"))
        named("disk").sender(meeting, replicas, iter(())).send(3, "/exports/0003")
    assert replicas.calls == [("/exports/0003", 3, ("float32", "bfloat16"))]
