"""The usage ledger alone: exact whatever ends the process, and whatever fails on the way."""

import asyncio
import logging
import os
from collections import defaultdict
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from deltamux.server.state.database import open_database
from deltamux.server.usage import journal, ledger
from deltamux.server.usage.counts import NOTHING, Consumer, Counts, Entry
from deltamux.server.usage.ledger import Ledger
from deltamux.server.usage.records import DIMENSIONS, UsageQuery, UsageRecords

ANN = Consumer("base", "ann", "k1", "poet", "aa" * 32)
BOB = Consumer("base", "bob", "k2")
ONE = Counts(1, 10, 2, 3)
TOKEN = Counts(completion_tokens=1)


@contextmanager
def opened(state_dir: Path):
    with open_database(state_dir) as database:
        yield Ledger(state_dir / "usage", UsageRecords(database))


def by_tenant(found) -> dict[str, Counts]:
    return {row.group[0]: row.counts for row in found}


async def tenants(of: Ledger) -> dict[str, Counts]:
    return by_tenant(await of.find(UsageQuery(group_by=("tenant",))))


def files(state_dir: Path) -> list[str]:
    return sorted(path.name for path in (state_dir / "usage").iterdir())


def test_what_was_counted_is_there_at_once_and_after_a_restart(tmp_path):
    async def story(of: Ledger) -> None:
        async with of.running():
            of.add(ANN, ONE)
            of.add(ANN, TOKEN)
            of.add(BOB, TOKEN)
            assert await tenants(of) == {"ann": ONE + TOKEN, "bob": TOKEN}
            of.add(BOB, TOKEN)

    with opened(tmp_path) as first:
        asyncio.run(story(first))
    assert files(tmp_path) == []
    with opened(tmp_path) as second:
        assert asyncio.run(tenants(second)) == {"ann": ONE + TOKEN, "bob": TOKEN + TOKEN}


def test_what_is_counted_is_written_before_it_may_be_sent(tmp_path, monkeypatch):
    writes = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, raw: writes.append(raw) or write(file, raw))
    with opened(tmp_path) as of:
        for number in range(1, 6):
            of.add(ANN, TOKEN)
            assert len(writes) == number


def abandon(state_dir: Path, counted: list[tuple[Consumer, Counts]], fold_after: set[int]) -> None:
    """Count, sometimes fold, and go without a goodbye, as ``kill -9`` would."""

    async def story(of: Ledger) -> None:
        for number, (consumer, counts) in enumerate(counted):
            of.add(consumer, counts)
            if number in fold_after:
                await of.fold()

    with opened(state_dir) as of:
        asyncio.run(story(of))


ENDINGS = st.sampled_from(["clean", "torn", "flipped", "not removed"])
LIVES = st.lists(
    st.tuples(
        st.lists(st.tuples(st.sampled_from([ANN, BOB]), st.sampled_from([ONE, TOKEN])), max_size=5),
        st.sets(st.integers(0, 4)),
        ENDINGS,
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(lives=LIVES)
def test_any_lives_and_ends_sum_up_to_what_was_counted(lives, tmp_path_factory):
    """A torn record, or one whose bits are wrong, counts as never written; none counts twice."""
    state_dir = tmp_path_factory.mktemp("state")
    expected: defaultdict[str, Counts] = defaultdict(Counts)
    for counted, fold_after, ending in lives:
        before = {path.name: path.read_bytes() for path in (state_dir / "usage").glob("*")}
        abandon(state_dir, counted, fold_after)
        for consumer, counts in counted:
            expected[consumer.tenant] += counts
        damage(state_dir / "usage", ending, before)
        with opened(state_dir) as of:
            assert asyncio.run(tenants(of)) == expected
            assert files(state_dir) == []


def damage(folder: Path, ending: str, before: dict[str, bytes]) -> None:
    """Leave what a process that ends in the middle of something leaves."""
    extra = journal._framed(10**6, b"\x90")
    if ending == "not removed":  # as if it had ended between folding and removing
        for name, raw in before.items():
            (folder / name).write_bytes(raw)
        return
    for path in sorted(folder.iterdir())[-1:]:
        with path.open("ab") as file:
            file.write({"clean": b"", "torn": extra[:-1], "flipped": flipped(extra)}[ending])


def flipped(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


def test_records_that_were_folded_and_not_removed_count_once(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(journal, "remove", lambda folder, last: None)
        abandon(tmp_path, [(ANN, ONE), (BOB, TOKEN), (ANN, TOKEN)], {0, 2})
    assert len(files(tmp_path)) == 2
    for _ in range(2):
        with opened(tmp_path) as of:
            assert asyncio.run(tenants(of)) == {"ann": ONE + TOKEN, "bob": TOKEN}


class Failing:
    """Records whose database is locked for a while."""

    def __init__(self, records: UsageRecords, failures: int) -> None:
        self.failures = failures
        self.records = records
        self.find = records.find
        self.last_record = records.last_record

    def fold(self, sums, last: int) -> None:
        if self.failures:
            self.failures -= 1
            raise OperationalError("insert", {}, Exception("database is locked"))
        self.records.fold(sums, last)


def test_a_database_that_fails_is_tried_again_and_nothing_is_lost(tmp_path, caplog):
    async def story(of: Ledger, records: Failing) -> None:
        of.add(ANN, ONE)
        records.failures = 2
        for _ in range(2):
            await of.fold()
            of.add(ANN, TOKEN)
        assert len(files(tmp_path)) == 3
        assert await tenants(of) == {"ann": ONE + TOKEN + TOKEN}
        assert files(tmp_path) == []

    with open_database(tmp_path) as database:
        records = Failing(UsageRecords(database), 0)
        asyncio.run(story(Ledger(tmp_path / "usage", records), records))
    assert caplog.text.count("database is locked") == 2


def test_journal_files_that_cannot_be_removed_count_once(tmp_path, monkeypatch, caplog):
    def refuse(folder: Path, last: int) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as patch, opened(tmp_path) as of:
        patch.setattr(journal, "remove", refuse)

        async def story() -> None:
            of.add(ANN, ONE)
            assert await tenants(of) == {"ann": ONE}

        asyncio.run(story())
    assert "read-only" in caplog.text
    with opened(tmp_path) as of:
        assert asyncio.run(tenants(of)) == {"ann": ONE}


def test_a_disk_that_is_full_holds_up_nobody_and_loses_nothing(tmp_path, monkeypatch, caplog):
    """Half of a record is written, then none, then there is room again."""
    write, left = os.write, [20, 0]

    def full(file: int, raw: bytes) -> int:
        if not left:
            return write(file, raw)
        if (room := left.pop(0)) == 0:
            raise OSError(28, "No space left on device")
        return write(file, raw[:room])

    async def story(of: Ledger) -> None:
        monkeypatch.setattr(os, "write", full)
        for _ in range(3):
            of.add(ANN, TOKEN)

    with caplog.at_level(logging.ERROR), opened(tmp_path) as of:
        asyncio.run(story(of))
    assert caplog.text.count("cannot be journalled") == 2
    with opened(tmp_path) as of:
        assert asyncio.run(tenants(of)) == {"ann": Counts(completion_tokens=3)}


def test_days_filters_and_groups(tmp_path, monkeypatch):
    day = date(2026, 3, 1)
    other_version = Consumer("base", "ann", "k1", "poet", "bb" * 32)

    async def story(of: Ledger) -> None:
        for later, consumer in enumerate((ANN, BOB, other_version, ANN)):
            seconds = (day + timedelta(later) - date(1970, 1, 1)).total_seconds()
            monkeypatch.setattr(ledger, "time", lambda seconds=seconds: seconds + 86399.9)
            of.add(consumer, TOKEN)

        async def found(*group_by: str, **query) -> dict:
            rows = await of.find(UsageQuery(group_by=group_by, **query))
            return {row.group: row.counts.completion_tokens for row in rows}

        assert await found("day") == {(f"2026-03-0{number}",): 1 for number in range(1, 5)}
        assert await found("day", start=date(2026, 3, 2), end=date(2026, 3, 3)) == {
            ("2026-03-02",): 1,
            ("2026-03-03",): 1,
        }
        assert await found("tenant") == {("ann",): 3, ("bob",): 1}
        assert await found("adapter", "digest") == {
            ("", ""): 1,
            ("poet", "aa" * 32): 2,
            ("poet", "bb" * 32): 1,
        }
        assert await found("adapter", adapter="") == {("",): 1}
        assert await found(tenant="ann", digest="bb") == {(): 1}
        assert await found("key_id", key_id="k2") == {("k2",): 1}
        assert await found(digest="%") == {}
        assert len(await found(*DIMENSIONS)) == 4
        assert await of.find(UsageQuery(start=date(2027, 1, 1), group_by=())) == []

    with opened(tmp_path) as of:
        asyncio.run(story(of))


def test_counts_are_whole_numbers_and_add_up():
    assert ONE + NOTHING == ONE
    assert Entry(1, ANN, ONE).counts + TOKEN == Counts(1, 10, 2, 4)


@pytest.mark.parametrize("raw", [b"", b"\0" * 15, b"\xff" * 40, b"\0" * 16])
def test_a_file_that_is_no_journal_holds_no_record(tmp_path, raw):
    (tmp_path / f"{1:020}.journal").write_bytes(raw)
    assert list(journal.read(tmp_path)) == []
