"""deltamux itself, started as a user would."""

import os
import sys

from ...machine import describe_versions
from ..scenarios import BASE
from .peer import Peer, Setup
from .server import Server, start_server

NAME = "deltamux"


def start(setup: Setup) -> Server:
    """``deltamux serve`` with all adapters; raises SystemFailed."""
    arguments = ["serve", str(setup.material.base), "--served-model-name", BASE]
    arguments += ["--dtype", "bfloat16", "--state-dir", str(setup.material.folder / "state")]
    for name, folder in setup.material.adapters.items():
        arguments += ["--adapter", f"{name}={folder}"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    threads = {"OMP_NUM_THREADS": str(setup.threads)}
    command = [sys.executable, "-m", "deltamux", *arguments]
    process, url = start_server(command, setup.log(NAME), env | threads, "/ready")
    return Server(
        process,
        url,
        versions=describe_versions("deltamux", "torch"),
        settings={"command": ["deltamux", *arguments], **threads},
    )


PEER = Peer(NAME, "this server over HTTP: the model's name picks the adapter", start)
