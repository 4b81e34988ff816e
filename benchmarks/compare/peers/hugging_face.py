"""transformers' and PEFT's ``generate``, as many use them: static batches."""

from collections.abc import Callable

from ..environment import Environment
from ..scenarios import SCENARIOS
from .library import Library
from .peer import ONLY_BASE, Peer, Setup

ENVIRONMENT = Environment("hugging-face", ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2"))
_NO_ADAPTER = {
    name: "transformers' figures are PEFT's without an adapter"
    for name in SCENARIOS
    if name in ("base-single", "base")
}


def _starter(name: str, adapters_by: str) -> Callable[[Setup], Library]:
    def start(setup: Setup) -> Library:
        return Library(
            name, "hugging_face", setup, ENVIRONMENT, dtype="bfloat16", adapters_by=adapters_by
        )

    return start


PEERS = (
    Peer(
        "transformers",
        "transformers' generate, a static batch of all streams",
        _starter("transformers", "none"),
        ONLY_BASE,
    ),
    Peer(
        "peft",
        "PEFT's generate, a static batch of all streams, a row's adapter by adapter_names",
        _starter("peft", "names"),
        _NO_ADAPTER,
    ),
    Peer(
        "peft-turns",
        "PEFT's generate, one adapter active at a time, its rows a static batch",
        _starter("peft-turns", "turns"),
        _NO_ADAPTER,
    ),
)
