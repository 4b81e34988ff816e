"""Make synthetic LoRA adapters: random weights in PEFT's format, any number, rank and targets.

Benchmarks need many adapters of known shape and do not care what they say. Module paths and shapes
are those of the base's own modules, which are built without memory for their weights.

    python -m deltamux.benchmarks.make_adapters --count 16 --rank 8 --rank 64 --out build/adapters
"""

import argparse
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ..server.config import default_state_dir
from ..server.model.source import resolve_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All linear modules of a layer of Llama's build."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MOST_AT_ONCE = 8
"""Adapters that are drawn at a time: one of an 8B base takes a quarter of a gigabyte meanwhile."""
B_STD = 0.02  # with A's rows of unit length on average, a delta of about a tenth of its input


def linear_modules(base: Path, targets: list[str]) -> Iterator[tuple[str, int, int]]:
    """(path, in_features, out_features) of every module whose last name is a target."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    for path, module in model.named_modules():
        if path.rpartition(".")[2] not in targets:
            continue
        if isinstance(module, nn.Linear):
            yield path, module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            yield path, module.nx, module.nf


def random_lora(
    modules: list[tuple[str, int, int]],
    rank: int,
    dtype: torch.dtype,
    seed: int,
    b_std: float = B_STD,
) -> dict[str, Tensor]:
    """A (rank, in) and B (out, rank) of every module, under PEFT's keys."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, in_features, out_features in modules:
        a = torch.randn(rank, in_features, generator=generator) / math.sqrt(in_features)
        b = torch.randn(out_features, rank, generator=generator) * b_std
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.to(dtype)
    return tensors


def write_adapter(folder: Path, tensors: dict[str, Tensor], rank: int, targets: list[str]) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_adapters(
    base: Path,
    folders: Iterable[Path],
    ranks: Sequence[int],
    *,
    targets: list[str] = TARGETS,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    b_std: float = B_STD,
) -> list[tuple[str, int, int]]:
    """Write a random LoRA into each folder, the ranks taken in turn, on the modules it gives.

    Raises:
        ValueError: The base has none of the modules.
    """
    modules = list(linear_modules(base, targets))
    if not modules:
        raise ValueError(f"{base}: no module is called {', '.join(targets)}")

    def write(index: int, folder: Path) -> None:
        rank = ranks[index % len(ranks)]
        tensors = random_lora(modules, rank, dtype, seed * 1_000_003 + index, b_std)
        write_adapter(folder, tensors, rank, targets)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_AT_ONCE)) as threads:
        # Read, so that what goes wrong in a thread is raised here.
        list(threads.map(write, count(), folders))
    return modules


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make synthetic LoRA adapters.")
    parser.add_argument("--base", default="smollm2", help="folder, .gguf file or hub id")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--rank", type=int, action="append", help="repeatable: taken in turn")
    parser.add_argument("--targets", default="q_proj,k_proj,v_proj,o_proj")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--name", default="synthetic", help="folders are called NAME-0, NAME-1, ..."
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state-dir", type=Path, default=default_state_dir())
    return parser.parse_args()


def main() -> None:
    """Write the folders and say what they are."""
    arguments = parse_arguments()
    ranks = arguments.rank or [8]
    modules = write_adapters(
        resolve_model(arguments.base, arguments.state_dir),
        [arguments.out / f"{arguments.name}-{index}" for index in range(arguments.count)],
        ranks,
        targets=arguments.targets.split(","),
        dtype=DTYPES[arguments.dtype],
        seed=arguments.seed,
    )
    print(f"{arguments.count} adapters of rank {ranks} on {len(modules)} modules: {arguments.out}")


if __name__ == "__main__":
    main()
