"""Makes the Hugging Face folder of a GGUF file: once, whole or not at all, and in another process.

What a conversion imports (torch, transformers, gguf) would stay in the memory of the HTTP process,
which has no other use for it.
"""

import contextlib
import fcntl
import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from .errors import ModelError


def convert_apart(source: Path, folder: Path) -> None:
    """``convert_once`` in a process of its own, which is gone when this returns or raises.

    Raises:
        ModelError: As ``convert_once``; or the process was killed.
        OSError: As ``convert_once``.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_run, args=(sender, source, folder), name="deltamux-conversion", daemon=True
    )
    process.start()
    sender.close()
    try:
        error: ModelError | OSError | None = receiver.recv()
    except EOFError:
        process.join()
        raise ModelError(f"{source}: its conversion {_end_of(process.exitcode)}") from None
    finally:
        process.kill()
        process.join()
        process.close()
        receiver.close()
    if error is not None:
        raise error


def convert_once(source: Path, folder: Path) -> None:
    """Convert a GGUF file, unless ``folder`` is there, or is once others have ended who convert it.

    It is made under another name and renamed when complete: whatever bears its name is whole.

    Raises:
        ModelCorrupt: The file is unreadable.
        ModelUnsupported: It holds what is not served.
        OSError: The folder cannot be written.
    """
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            _convert_into(source, folder)


def _convert_into(source: Path, folder: Path) -> None:
    from .gguf_file import convert_gguf

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        convert_gguf(source, partial)
    except ModelError as error:
        shutil.rmtree(partial)
        raise type(error)(f"{source}: {error}") from error
    partial.rename(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(pipe: Connection, source: Path, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends it
    error = None
    try:
        convert_once(source, folder)
    except (ModelError, OSError) as raised:
        error = raised
    with contextlib.suppress(BrokenPipeError):  # killed, the server left it to end by itself
        pipe.send(error)


def _end_of(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was ended by {name}; where the system is short of memory, it does that"
    return f"failed with status {code}, for the reason above"
