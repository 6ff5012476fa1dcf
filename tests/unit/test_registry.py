"""What other packages add is found, and their metadata are not read again and again."""

from importlib import metadata
from pathlib import Path

import pytest

from onlinerl import registry
from onlinerl.protocols.oracle import Oracle

PACKAGE = """
from onlinerl.protocols.oracle import Oracle


class Brevity(Oracle):
    pass
"""


def test_a_package_that_comes_onto_the_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when names were asked for before."""
    assert "brevity" not in registry.names("oracles")
    (tmp_path / "brief.py").write_text(PACKAGE)
    installed = tmp_path / "brief-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: brief\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[onlinerl.oracles]\nbrevity = brief:Brevity\n")

    monkeypatch.syspath_prepend(tmp_path)

    assert "brevity" in registry.names("oracles")
    assert registry.load("oracles", "brevity", Oracle).__module__ == "brief"


def test_metadata_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # a path that nobody has asked about yet
    read = []
    entry_points = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **of: read.append(of) or entry_points(**of))

    for role in ("oracles", "algorithms", "oracles"):
        registry.names(role)
        registry.load("oracles", "sentiment", Oracle)

    assert len(read) == 1
