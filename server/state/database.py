"""The server's database: one SQLite file in the state folder, one server at a time.

It is written ahead (WAL) and flushed at every commit, so that what was acknowledged is there after
``kill -9`` and after a power cut. Migrations run when it is opened, each in one transaction.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import ConnectionPoolEntry

DATABASE_FILE = "deltamux.sqlite"
_ADDRESS_FILE = "address"

_BUSY_MILLISECONDS = 10_000
_MIGRATIONS = Path(__file__).parent / "migrations"


class StateError(Exception):
    """The state folder cannot be used; the message says why and what to do."""


class StateTaken(StateError):
    """The state folder belongs to a server that is running."""


@contextmanager
def open_database(state_dir: Path) -> Iterator[Engine]:
    """The database of the state folder, up to date; nobody else opens it while the block runs.

    Raises:
        StateTaken: Another server has it.
        StateError: It cannot be read or brought up to date.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    with _owned(state_dir):
        engine = _connect(state_dir / DATABASE_FILE)
        try:
            migrate(engine)
            yield engine
        except (DatabaseError, CommandError) as error:
            raise StateError(
                f"the database {state_dir / DATABASE_FILE} cannot be used: {error}; restore it from"
                " a copy, or name another --state-dir"
            ) from error
        finally:
            engine.dispose()


def write_address(state_dir: Path, url: str) -> None:
    """Say where the server that has the folder is reached, for commands that would change it."""
    (state_dir / _ADDRESS_FILE).write_text(url)


def read_address(state_dir: Path) -> str | None:
    """What the server that has the folder said last, None where it said nothing."""
    try:
        return (state_dir / _ADDRESS_FILE).read_text()
    except FileNotFoundError:
        return None


def migrate(engine: Engine) -> None:
    """Bring the tables up to date, in one transaction."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def _owned(state_dir: Path) -> Iterator[None]:
    """Held by one server at a time; the system lets go of it when the process ends."""
    with (state_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateTaken(
                f"the state folder {state_dir} belongs to a server that is running; give this one"
                " its own with --state-dir"
            ) from None
        yield


def _connect(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}")
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # sqlite3 itself would begin transactions late and not at all for changes of tables.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        f"busy_timeout = {_BUSY_MILLISECONDS}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
