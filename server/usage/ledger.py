"""Counts usage so that nothing that was sent is lost, whatever ends the process.

Counts are journalled before what they count is sent, each by a ``write`` of its own: it takes
microseconds, less than to wait for others' with whom to share one. Every few seconds, and at the
start, they are added to the sums in the database, together with the number of the last journal
record these hold.

So after ``kill -9`` the sums hold all that was sent, and beside it at most the last update of each
stream that was open: journalled, and not sent any more. A power cut can take what was not yet
added to the database: the last seconds.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import time

from sqlalchemy.exc import SQLAlchemyError

from . import journal
from .counts import Consumer, Counts, Entry, Sums, add_entry
from .journal import Journal
from .records import UsageQuery, UsageRecords, UsageRow

logger = logging.getLogger(__name__)

_FOLD_SECONDS = 10.0
_DAY = 86_400


class Ledger:
    """All usage; belongs to the event loop's thread.

    Args:
        folder: Of the journal.
        records: The sums.
    """

    def __init__(self, folder: Path, records: UsageRecords) -> None:
        """Take in what a server that was killed left in the journal; blocks.

        Raises:
            OSError: The journal cannot be read.
            SQLAlchemyError: The database cannot be written.
        """
        self._folder = folder
        self._records = records
        self._journal = Journal(folder, _recover(folder, records))
        self._unwritten: Sums = {}
        self._unfolded: Sums = {}
        self._folding = asyncio.Lock()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Bring what is counted to the database while the block runs, and all of it at its end."""
        closing = asyncio.Event()
        task = asyncio.create_task(self._keep_folding(closing), name="usage-ledger")
        try:
            yield
        finally:
            closing.set()
            await task

    def add(self, consumer: Consumer, counts: Counts) -> None:
        """Count; what is counted may be sent once this returns.

        What cannot be written is kept, told of, and written with what comes next.
        """
        add_entry(self._unwritten, Entry(int(time()) // _DAY, consumer, counts))
        self._write()

    async def find(self, query: UsageQuery) -> list[UsageRow]:
        """Usage up to now.

        Raises:
            SQLAlchemyError: The database cannot be read.
        """
        await self.fold()
        return await asyncio.to_thread(self._records.find, query)

    async def fold(self) -> None:
        """Add to the database what was counted since the last time; a failure is tried again."""
        # Whoever waits may be cancelled; what moves the sums may not.
        await asyncio.shield(self._fold())

    async def _fold(self) -> None:
        async with self._folding:
            self._write()
            if not self._unfolded:
                return
            sums, self._unfolded = self._unfolded, {}
            self._journal.rotate()
            try:
                await asyncio.to_thread(self._fold_journal, sums, self._journal.last)
            except SQLAlchemyError as error:
                for (day, consumer), counts in sums.items():
                    add_entry(self._unfolded, Entry(day, consumer, counts))
                logger.error("usage stays in its journal, the database is tried again: %s", error)

    def _fold_journal(self, sums: Sums, last: int) -> None:
        self._records.fold(sums, last)
        try:
            journal.remove(self._folder, last)
        except OSError as error:
            logger.error("usage that is in the database stays in its journal too: %s", error)

    async def _keep_folding(self, closing: asyncio.Event) -> None:
        while not closing.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(closing.wait(), _FOLD_SECONDS)
            await self.fold()

    def _write(self) -> None:
        if not self._unwritten:
            return
        entries = [Entry(*key, counts) for key, counts in self._unwritten.items()]
        try:
            self._journal.append(entries)
        except OSError as error:
            logger.error("usage cannot be journalled and is kept in memory: %s", error)
            return
        self._unwritten.clear()
        for entry in entries:
            add_entry(self._unfolded, entry)


def _recover(folder: Path, records: UsageRecords) -> int:
    """Add to the sums what only the journal holds; the number of its last record."""
    folded = last = records.last_record()
    sums: Sums = {}
    for record in journal.read(folder):
        if record.number > folded:
            last = record.number
            for entry in record.entries:
                add_entry(sums, entry)
    if sums:
        records.fold(sums, last)
    journal.remove(folder, last)
    return last
