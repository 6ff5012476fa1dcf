"""What other packages add is found, and their metadata are not read again and again."""

from importlib import metadata
from pathlib import Path

import pytest

from onlinerl import registry
from onlinerl.errors import ConfigError
from onlinerl.protocols.oracle import Oracle

PACKAGE = """
from onlinerl.protocols.oracle import Oracle


class Brevity(Oracle):
    pass
"""


def install(folder: Path, name: str, module: str) -> None:
    """A package that adds the oracle `name`."""
    (folder / f"{name}_package.py").write_text(module)
    installed = folder / f"{name}-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[onlinerl.oracles]\n{name} = {name}_package:Brevity\n")


def test_a_package_that_comes_onto_the_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when names were asked for before."""
    assert "brevity" not in registry.names("oracles")
    install(tmp_path, "brevity", PACKAGE)

    monkeypatch.syspath_prepend(tmp_path)

    assert "brevity" in registry.names("oracles")
    assert registry.load("oracles", "brevity", Oracle).__module__ == "brevity_package"


@pytest.mark.parametrize(
    ("name", "module", "says"),
    [
        ("broken", "import a_package_that_is_not_there", "cannot import 'broken_package'"),
        ("empty", "", "empty_package has no 'Brevity'"),
        ("other", "Brevity = 3", "other_package:Brevity is no subclass of"),
    ],
)
def test_a_package_that_does_not_work_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, says: str
) -> None:
    install(tmp_path, name, module)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=says) as caught:
        registry.load("oracles", name, Oracle)
    assert (caught.value.field, bool(caught.value.fix)) == ("oracle.name", True)


def test_metadata_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # a path that nobody has asked about yet
    read = []
    entry_points = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **of: read.append(of) or entry_points(**of))

    for role in ("oracles", "algorithms", "oracles"):
        registry.names(role)
        registry.load("oracles", "sentiment", Oracle)

    assert len(read) == 1
