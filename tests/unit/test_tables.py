"""A table keeps what it promised, however long it is and wherever it is interrupted."""

from __future__ import annotations

import errno
import os
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from values import group, groups, label, labels, logprobs, pair

from onlinerl.errors import StoreError
from onlinerl.stores import _arrow, _files, _journal, _manifest, _parts, _tables
from onlinerl.stores._tables import TableFiles
from onlinerl.stores.directory import RunDirectory
from onlinerl.stores.rows import LABELS, LOGPROBS, PAIRS, PROMPTS, groups_of
from onlinerl.stores.tables import StoredTable

MANIFEST = {"name": "r", "config_digest": "abc", "fingerprint": {}}


@pytest.fixture
def run(tmp_path) -> Iterator[RunDirectory]:
    with RunDirectory.create(tmp_path / "r", config_yaml="", manifest=MANIFEST) as run:
        yield run


@pytest.fixture
def small_parts(monkeypatch):
    """Every part holds a few groups, in row groups of one or two."""
    monkeypatch.setattr(_tables, "PART_BYTES", 2000)
    monkeypatch.setattr(_parts, "ROW_GROUP_BYTES", 700)


def folder(run: RunDirectory) -> Path:
    return run.path / "iterations/0001"


def names(run: RunDirectory) -> list[str]:
    return sorted(str(p.relative_to(folder(run))) for p in folder(run).rglob("*") if p.is_file())


def again(run: RunDirectory) -> RunDirectory:
    """As a process that has not looked at the tables yet."""
    return RunDirectory(run.path, run._lock)


@pytest.mark.parametrize("all_of_it", [True, False])
def test_rows_are_found_although_the_journal_becomes_a_part_meanwhile(run, monkeypatch, all_of_it):
    """Another process completes the table after this one has seen that there is no part, and before it opens the journal."""
    table, read = run.groups(1, "rollouts"), _journal.read
    table.append(groups(5))
    reader = again(run).groups(1, "rollouts")

    def too_late(path: Path) -> Iterator[object]:
        monkeypatch.setattr(_journal, "read", read)
        table.seal()
        return read(path)

    monkeypatch.setattr(_journal, "read", too_late)
    assert list(reader if all_of_it else reader.select([g.prompt.id for g in groups(5)])) == groups(5)


def test_values_read_the_same_before_and_after_sealing(run):
    table = run.groups(1, "rollouts")
    table.append(groups(5)[:2])
    table.append(groups(5)[2:])
    assert list(table) == groups(5)
    assert names(run) == ["rollouts.0001.journal"]
    table.seal()
    assert list(table) == groups(5)
    assert names(run) == ["manifest.json", "rollouts.parquet/0001.parquet"]
    table.seal()
    assert list(again(run).groups(1, "rollouts")) == groups(5)
    with pytest.raises(StoreError, match="'rollouts' of iteration 1 is complete and takes no more rows"):
        again(run).groups(1, "rollouts").append(groups(1))
    with pytest.raises(StoreError, match="takes no more rows"):
        table.clear()


def test_every_tool_opens_a_complete_table(run):
    table = run.groups(1, "rollouts")
    table.append(groups(3))
    table.seal()
    found = pq.read_table(folder(run) / "rollouts.parquet")
    assert found.column("texts").to_pylist() == [[r.text for r in g.rollouts] for g in groups(3)]
    assert str(found.schema.field("logprobs").type) == "list<element: list<element: double>>"
    assert run.read(1, "rollouts")[1]["token_ids"] == [list(r.token_ids) for r in group(1).rollouts]


def test_empty_tables(run):
    table = run.labels(1, "verdicts")
    assert list(table) == []
    table.append([])
    assert names(run) == [] if folder(run).exists() else True
    table.seal()
    assert table.sealed
    assert list(table) == []
    assert run.iterations() == [1]


def test_a_long_table_is_parts_of_bounded_size(run, small_parts):
    table = run.groups(1, "rollouts")
    for one in groups(40):
        table.append([one])
    parts = sorted((folder(run) / "rollouts.parquet").iterdir())
    assert len(parts) > 5
    assert list(table) == groups(40), "while it grows"
    assert list(again(run).groups(1, "rollouts")) == groups(40), "by another process"
    table.seal()
    assert [one for one in again(run).groups(1, "rollouts")] == groups(40)
    assert sum(pq.read_metadata(part).num_rows for part in (folder(run) / "rollouts.parquet").iterdir()) == 40
    assert not list(folder(run).glob("*.journal"))


def test_rows_are_found_by_their_ids(run, small_parts):
    """In any order, in parts and in the journal, before and after the journal has become a part."""
    table = run.groups(1, "rollouts")
    wanted = [f"p{n}" for n in (7, 33, 0, 39, 21, 7)]
    expected = [group(n) for n in (7, 33, 0, 39, 21, 7)]
    for one in groups(40):
        table.append([one])
        assert next(table.select([one.prompt.id])) == one
    for reader in (table, again(run).groups(1, "rollouts")):
        assert list(reader.select(wanted)) == expected
        assert list(reader.select(["p99"])) == [None]
        assert reader.missing(["p99", "p3", "p98"]) == ["p99", "p98"]
    table.seal()
    for reader in (table, again(run).groups(1, "rollouts")):
        assert list(reader.select(wanted)) == expected


def test_the_latest_row_of_a_prompt_counts(run, small_parts):
    """A group that was asked for again, because the engine's first answer was unusable."""
    table = run.groups(1, "rollouts")
    table.append([group(3, rejected=("logprob",))])
    for one in groups(20):
        table.append([one])
    for reader in (table, again(run).groups(1, "rollouts")):
        assert list(reader.select(["p3"])) == [group(3)]


def test_a_reader_sees_what_another_process_has_made_a_part(run, small_parts):
    table = run.groups(1, "rollouts")
    table.append([group(0)])
    reader = StoredTable(TableFiles(folder(run), "rollouts"), groups_of(None))
    assert reader.missing(["p0"]) == []
    for one in groups(12)[1:]:
        table.append([one])
    table.seal()
    assert list(reader.select(["p0"])) == [group(0)]
    assert list(reader) == groups(12)


def test_values_that_cannot_be_stored_leave_the_table_as_it_was(run):
    table = run.pairs(1)
    table.append([pair(1)])
    with pytest.raises(TypeError, match="column 'chosen'"):
        table.append([pair(2), pair(3, chosen="x")])
    assert list(table) == [pair(1)]


def test_a_table_begins_again(run, small_parts):
    table = run.pairs(1)
    for n in range(60):
        table.append([pair(n)])
    assert (folder(run) / "pairs.parquet").exists()
    table.clear()
    assert list(table) == []
    assert names(run) == ["manifest.json"]
    table.append([pair(99)])
    table.seal()
    assert list(again(run).pairs(1)) == [pair(99)]


# --- crashes ---


def test_a_journal_torn_at_any_byte_loses_only_what_was_not_durable(run):
    table = run.labels(1, "verdicts")
    ends = []
    journal = folder(run) / "verdicts.0001.journal"
    for one in labels(range(3)):
        table.append([one])
        ends.append(journal.stat().st_size)
    whole = journal.read_bytes()
    for cut in range(len(whole) + 1):
        journal.write_bytes(whole[:cut])
        durable = sum(end <= cut for end in ends)
        fresh = again(run).labels(1, "verdicts")
        assert list(fresh) == labels(range(durable)), cut
        if cut % 7 == 0:
            fresh.append([label(9, 1.0)])
            assert list(again(run).labels(1, "verdicts")) == [*labels(range(durable)), label(9, 1.0)], cut


@pytest.mark.parametrize("kept", [0, 10, 200])
def test_blocks_that_a_power_cut_left_unwritten_are_ignored(run, kept):
    """The file has grown, and the disk has only some of the blocks."""
    table = run.labels(1, "verdicts")
    table.append(labels(range(2)))
    journal = folder(run) / "verdicts.0001.journal"
    durable = journal.read_bytes()
    table.append(labels(range(2, 60)))
    frame = journal.read_bytes()[len(durable) :]
    assert len(frame) > 1500
    journal.write_bytes(durable + frame[:kept] + bytes(len(frame) - kept))
    assert list(again(run).labels(1, "verdicts")) == labels(range(2))
    fresh = again(run).labels(1, "verdicts")
    fresh.append(labels(range(2, 4)))
    assert list(fresh) == labels(range(4))


def test_damage_before_the_last_frame_is_no_torn_tail(run):
    table = run.labels(1, "verdicts")
    table.append(labels(range(40)))
    journal = folder(run) / "verdicts.0001.journal"
    first = journal.stat().st_size
    table.append(labels(range(40, 41)))
    journal.write_bytes(bytes(first) + journal.read_bytes()[first:])
    with pytest.raises(StoreError, match="byte 0 does not agree") as caught:
        list(run.labels(1, "verdicts"))
    assert "remove 0001 and all later numbers" in caught.value.fix


class Killed(BaseException):
    """Nothing after it happens."""


def killed(*_args, **_kwargs):
    raise Killed


@pytest.mark.parametrize(
    ("module", "function"),
    [(_parts, "write"), (_manifest, "update_table"), (_journal, "discard")],
    ids=["before the part", "before the manifest", "before the journal goes"],
)
@pytest.mark.parametrize("sealing", [True, False])
def test_a_kill_in_the_middle_of_making_a_part_loses_and_repeats_nothing(run, monkeypatch, module, function, sealing):
    table = run.groups(1, "rollouts")
    table.append(groups(6)[:3])
    with monkeypatch.context() as patch:
        patch.setattr(module, function, killed)
        if not sealing:
            patch.setattr(_tables, "PART_BYTES", 1)
        with pytest.raises(Killed):
            table.seal() if sealing else table.append(groups(6)[3:])
    there = groups(3 if sealing else 6)
    fresh = again(run).groups(1, "rollouts")
    assert list(fresh) == there
    assert list(fresh.select(["p2", "p0"])) == [group(2), group(0)]
    if not fresh.sealed:
        fresh.append([group(6)])
        there = [*there, group(6)]
    fresh.seal()
    assert list(again(run).groups(1, "rollouts")) == there
    assert not list(folder(run).glob("*.journal"))


@pytest.mark.parametrize("call", ["writev", "fsync"])
def test_a_full_disk_during_append_adds_nothing_and_says_how_to_continue(run, monkeypatch, call):
    table = run.labels(1, "verdicts")
    table.append(labels(range(1)))

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def half_then_full(descriptor, pieces):
        data = b"".join(pieces)
        os.write(descriptor, data[: len(data) // 2])
        full()

    monkeypatch.setattr(os, call, half_then_full if call == "writev" else full)
    with pytest.raises(StoreError, match=r"disk is full.*safe") as caught:
        table.append(labels(range(1, 3)))
    assert "resume" in caught.value.fix
    monkeypatch.undo()
    assert list(table) == labels(range(1))
    table.append(labels(range(1, 3)))
    assert list(table) == labels(range(3))
    assert list(table.select(["p2"])) == labels([2])


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_all_of_them(run, monkeypatch):
    table, calls = run.labels(1, "verdicts"), []

    def few(descriptor, pieces):
        calls.append(descriptor)
        return os.write(descriptor, b"".join(pieces)[:7])

    monkeypatch.setattr(os, "writev", few)
    table.append(labels(range(2)))
    monkeypatch.undo()
    assert len(calls) > 10
    assert list(table) == list(run.labels(1, "verdicts")) == labels(range(2))


# --- size ---


def test_no_more_than_a_part_is_in_memory(run, monkeypatch):
    """Appended, read in order and in another order, and complete: 8 MB of responses in parts of 256 KB."""
    monkeypatch.setattr(_tables, "PART_BYTES", 1 << 18)
    monkeypatch.setattr(_parts, "ROW_GROUP_BYTES", 1 << 15)
    table = run.groups(1, "rollouts")
    values = [group(n, tokens=512) for n in range(8)]

    def peak(work) -> float:
        tracemalloc.start()
        work()
        reached = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return reached / (1 << 20)

    def write() -> None:
        for n in range(600):
            one = values[n % 8]
            table.append([type(one)(prompt=type(one.prompt)(id=f"p{n}", text="", token_ids=()), rollouts=one.rollouts)])
        table.seal()

    assert peak(write) < 3
    assert peak(lambda: sum(1 for _ in table)) < 3
    assert peak(lambda: sum(1 for _ in table.select(f"p{n}" for n in range(0, 600, 3)))) < 3


def test_appends_and_reads_in_many_threads(run, small_parts):
    table, found, failed = run.labels(1, "verdicts"), set[str](), list[BaseException]()

    def read() -> None:
        try:
            while len(found) < 60:
                found.update(one.prompt_id for one in run.labels(1, "verdicts").select([f"p{n}" for n in range(60)]) if one)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    for one in labels(range(60)):
        table.append([one])
    for thread in readers:
        thread.join(timeout=60)
    assert not failed
    assert len(found) == 60


def test_scratch_is_a_sequence_on_the_disk(run):
    with run.scratch() as scratch:
        kept = scratch.keep(logprobs(n, 3, 2) for n in range(10))
        assert len(kept) == 10
        assert kept[3].arrays["reference_logprobs"][1].tobytes() == logprobs(3, 3, 2).arrays["reference_logprobs"][1].tobytes()
        assert [one.prompt_id for one in kept] == [f"p{n}" for n in range(10)]
        assert [one.prompt_id for one in kept[-2:]] == ["p8", "p9"]
        assert kept[-1].prompt_id == "p9"
        with pytest.raises(IndexError):
            kept[10]
    assert [p for p in run.path.iterdir() if p.name.startswith("tmp")] == []


def test_a_full_disk_under_the_scratch_is_what_is_said_and_not_what_closing_it_says(run, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/dev/full", "r+b"))  # noqa: SIM115
    with pytest.raises(StoreError, match="the disk is full"), run.scratch() as scratch:
        scratch.keep([1, 2, 3])


def test_a_full_disk_under_the_scratch_is_said(run, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with run.scratch() as scratch, pytest.raises(StoreError, match="disk is full"):
        scratch.keep([1])


def test_the_lists_of_a_schema_are_those_of_its_rows():
    for codec, value in ((LABELS, label(1, 0.5)), (groups_of(None), group(1))):
        assert list(codec.to_row(value)) == codec.schema.names
    assert _files.FORMAT == 6


def test_no_column_of_today_has_the_name_of_one_of_an_earlier_format():
    """It would be read as another one."""
    for codec in (LABELS, LOGPROBS, PAIRS, PROMPTS, groups_of(None)):
        assert [_arrow.as_now(name) for name in codec.schema.names] == codec.schema.names
