"""The sums of usage in the database. Every method is one transaction, and blocks."""

from dataclasses import dataclass
from datetime import date, timedelta

from sqlalchemy import Engine, func, select
from sqlalchemy.dialects.sqlite import insert

from ..state.schema import usage, usage_journal
from .counts import Counts, Sums

DIMENSIONS = ("day", "base", "tenant", "key_id", "adapter", "digest")
"""What usage can be grouped by."""

COUNTS = Counts.__struct_fields__

_EPOCH = date(1970, 1, 1)
_THE_ROW = 1


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Which usage, and how it is summed up.

    Attributes:
        start: First day, in UTC.
        end: Last day.
        group_by: Of ``DIMENSIONS``; the others are summed over.
        tenant: Only this one's; None for all.
        key_id: Only this key's.
        adapter: Only this adapter's, empty for the bare base.
        digest: Only versions whose digest begins like this.
    """

    start: date = date.min
    end: date = date.max
    group_by: tuple[str, ...] = DIMENSIONS
    tenant: str | None = None
    key_id: str | None = None
    adapter: str | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A group's sum.

    Attributes:
        group: Values of what was grouped by, in that order.
        counts: What was used.
    """

    group: tuple[str, ...]
    counts: Counts


class UsageRecords:
    """Usage as it is kept on disk."""

    def __init__(self, database: Engine) -> None:
        """Use the database."""
        self._database = database

    def last_record(self) -> int:
        """Number of the last record of the journal that is part of the sums; 0 for none."""
        with self._database.connect() as connection:
            found = connection.execute(select(usage_journal.c.last_record)).scalar()
        return found or 0

    def fold(self, sums: Sums, last: int) -> None:
        """Add what the journal's records up to ``last`` hold beyond those that were added."""
        rows = [
            {
                "day": (_EPOCH + timedelta(day)).isoformat(),
                **{name: getattr(consumer, name) for name in DIMENSIONS[1:]},
                **{name: getattr(counts, name) for name in COUNTS},
            }
            for (day, consumer), counts in sums.items()
        ]
        with self._database.begin() as connection:
            connection.execute(_ADDITION, rows)
            connection.execute(_POSITION, {"id": _THE_ROW, "last_record": last})

    def find(self, query: UsageQuery) -> list[UsageRow]:
        """The sums of every group that has any, in order."""
        groups = [usage.c[name] for name in query.group_by]
        sums = [func.sum(usage.c[name]) for name in COUNTS]
        found = select(*groups, *sums).where(
            usage.c.day.between(query.start.isoformat(), query.end.isoformat())
        )
        for name in ("tenant", "key_id", "adapter"):
            if (value := getattr(query, name)) is not None:
                found = found.where(usage.c[name] == value)
        if query.digest is not None:
            found = found.where(usage.c.digest.startswith(query.digest, autoescape=True))
        with self._database.connect() as connection:
            rows = connection.execute(found.group_by(*groups).order_by(*groups)).all()
        # Without groups SQL sums up nothing to one row of nulls.
        some = [tuple(row) for row in rows if row[-1] is not None]
        return [UsageRow(row[: len(groups)], Counts(*row[len(groups) :])) for row in some]


_new = insert(usage)
_ADDITION = _new.on_conflict_do_update(
    index_elements=[usage.c[name] for name in DIMENSIONS],
    set_={name: usage.c[name] + _new.excluded[name] for name in COUNTS},
)
_POSITION = insert(usage_journal).on_conflict_do_update(
    index_elements=[usage_journal.c.id],
    set_={"last_record": insert(usage_journal).excluded.last_record},
)
