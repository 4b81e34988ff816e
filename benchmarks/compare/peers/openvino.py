"""OpenVINO GenAI's continuous batching: with all adapters, and without any for the base alone."""

from collections.abc import Callable
from pathlib import Path

from ..environment import Environment
from ..process import run_tool
from ..scenarios import SCENARIOS
from .library import Library
from .peer import ONLY_BASE, Peer, Setup

_ENVIRONMENT = Environment(
    "openvino",
    ("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0"),
    without=("torchvision",),  # a build for another torch, which breaks the import of transformers
)


def _starter(name: str, *, lora: bool, turns: bool = False) -> Callable[[Setup], Library]:
    def start(setup: Setup) -> Library:
        model = _exported(setup)
        return Library(
            *(name, "openvino", setup, _ENVIRONMENT),
            model=str(model),
            lora=lora,
            turns=turns,
            precision="bf16",
        )

    return start


def _exported(setup: Setup) -> Path:
    """The base as OpenVINO reads it, in float32 so that its bfloat16 numbers are kept."""
    folder = setup.material.folder / "openvino"
    if folder.is_dir():
        return folder
    export = setup.environments.python(_ENVIRONMENT).with_name("optimum-cli")
    partial = folder.with_suffix(".partial")
    options = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    run_tool(
        [export, "export", "openvino", "--model", setup.material.base, *options, partial],
        setup.log("openvino-export"),
    )
    return partial.rename(folder)


_AS_OPENVINO = {
    name: "the same as openvino" for name in SCENARIOS if name not in ("distinct", "mixed")
}
PEERS = (
    Peer(
        "openvino",
        "OpenVINO GenAI's continuous batching, all requests of a batch together",
        _starter("openvino", lora=True),
    ),
    Peer(
        "openvino-turns",
        "the same, one adapter at a time",
        _starter("openvino-turns", lora=True, turns=True),
        _AS_OPENVINO,
    ),
    Peer(
        "openvino-base",
        "the same without adapters",
        _starter("openvino-base", lora=False),
        ONLY_BASE,
    ),
)
