"""The catalogue in the database. Every method is one transaction, and blocks."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from sqlalchemy import Engine, RowMapping, bindparam, delete, select, update
from sqlalchemy.dialects.sqlite import insert

from ..state.schema import adapters, versions
from .contents import ContentStore
from .entries import Adapter, Usage, Version, decode_info, encode_info


class Records:
    """Adapters of one base as they are kept on disk."""

    def __init__(self, database: Engine, base: str, contents: ContentStore) -> None:
        """Use the database; own copies of versions lie in ``contents``."""
        self._database = database
        self._base = base
        self._contents = contents

    def load(self) -> list[tuple[Adapter, Usage]]:
        """Every adapter, also those whose origin is not part of this start."""
        with self._database.connect() as connection:
            rows = connection.execute(
                select(adapters).where(adapters.c.base == self._base)
            ).mappings()
            found = rows.all()
            ids = select(adapters.c.id).where(adapters.c.base == self._base)
            of_adapter: defaultdict[int, list[Version]] = defaultdict(list)
            query = select(versions).where(versions.c.adapter_id.in_(ids))
            for row in connection.execute(query.order_by(versions.c.registered.desc())).mappings():
                of_adapter[row["adapter_id"]].append(self._version(row))
        return [(_adapter(row, of_adapter[row["id"]]), _usage(row)) for row in found]

    def digests(self) -> set[str]:
        """Contents that any adapter of any base has."""
        with self._database.connect() as connection:
            return set(connection.execute(select(versions.c.digest).distinct()).scalars())

    def copies(self) -> dict[str, int]:
        """Sizes of the store's own copies, of all bases, by digest."""
        with self._database.connect() as connection:
            query = select(versions.c.digest, versions.c.file_bytes).where(
                versions.c.path.is_(None)
            )
            return {row.digest: row.file_bytes for row in connection.execute(query)}

    def has_content(self, digest: str) -> bool:
        """Whether any adapter of any base has this content."""
        with self._database.connect() as connection:
            query = select(versions.c.id).where(versions.c.digest == digest).limit(1)
            return connection.execute(query).first() is not None

    def put(self, adapter: Adapter) -> None:
        """Write the adapter with exactly its versions."""
        row = _adapter_row(adapter, self._base)
        with self._database.begin() as connection:
            insertion = insert(adapters).values(**row, hits=0)
            adapter_id = connection.execute(
                insertion.on_conflict_do_update(
                    index_elements=[adapters.c.base, adapters.c.name], set_=row
                ).returning(adapters.c.id)
            ).scalar_one()
            connection.execute(delete(versions).where(versions.c.adapter_id == adapter_id))
            if adapter.versions:
                rows = [_version_row(each, adapter_id) for each in adapter.versions]
                connection.execute(insert(versions), rows)

    def delete(self, name: str) -> None:
        """Forget the adapter and its versions."""
        with self._database.begin() as connection:
            connection.execute(
                delete(adapters).where(adapters.c.base == self._base, adapters.c.name == name)
            )

    def note_usage(self, usages: Mapping[str, Usage]) -> None:
        """Write how often and when adapters were used."""
        statement = (
            update(adapters)
            .where(adapters.c.base == self._base, adapters.c.name == bindparam("of"))
            .values(hits=bindparam("times"), last_used=bindparam("at"))
        )
        rows = [
            {"of": name, "times": usage.hits, "at": usage.last_used}
            for name, usage in usages.items()
        ]
        with self._database.begin() as connection:
            connection.execute(statement, rows)

    def _version(self, row: RowMapping) -> Version:
        path = row["path"]
        return Version(
            digest=row["digest"],
            source=row["source"],
            fingerprint=row["fingerprint"],
            path=str(self._contents.path(row["digest"])) if path is None else path,
            copied=path is None,
            file_bytes=row["file_bytes"],
            info=decode_info(row["info"]),
            registered=row["registered"],
        )


def _adapter(row: RowMapping, found: Sequence[Version]) -> Adapter:
    return Adapter(
        name=row["name"],
        source=row["source"],
        origin=row["origin"],
        created=row["created"],
        default_digest=row["default_digest"],
        versions=tuple(found),
        pinned=row["pinned"],
        owner=row["owner"],
        expected=row["expected"],
    )


def _usage(row: RowMapping) -> Usage:
    return Usage(row["hits"], row["last_used"])


def _adapter_row(adapter: Adapter, base: str) -> dict[str, object]:
    return {
        "base": base,
        "name": adapter.name,
        "origin": adapter.origin,
        "source": adapter.source,
        "expected": adapter.expected,
        "owner": adapter.owner,
        "pinned": adapter.pinned,
        "default_digest": adapter.default_digest,
        "created": adapter.created,
    }


def _version_row(version: Version, adapter_id: int) -> dict[str, object]:
    return {
        "adapter_id": adapter_id,
        "digest": version.digest,
        "source": version.source,
        "fingerprint": version.fingerprint,
        "path": None if version.copied else version.path,
        "file_bytes": version.file_bytes,
        "info": encode_info(version.info),
        "registered": version.registered,
    }
