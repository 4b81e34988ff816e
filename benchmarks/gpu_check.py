"""Checks the kernels, the graphs and the server on an NVIDIA GPU, and measures all three.

    python -m deltamux.benchmarks.gpu_check [--out DIR] [--base MODEL] [--section NAME]

Each section runs in a process of its own, so that one that breaks the GPU's context leaves the
others theirs. Progress goes to standard error. DIR gets ``gpu-check.json`` and ``gpu-check.md``;
the last line of standard output is that JSON. Exits 1 if anything was wrong, 2 without a GPU.
``docs/gpu-check.md`` explains the report.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from traceback import format_exception
from typing import Any

import torch

from . import gpu_graphs, gpu_parity, gpu_serving, gpu_speed
from .gpu_section import SHOWN_FAULTS, Options, Outcome, Section, attempt, say
from .machine import describe_machine, describe_versions
from .markdown import table

SECTIONS: Mapping[str, Section] = {
    each.name: each
    for each in (
        Section(
            "parity",
            "The kernels' tests, on this GPU",
            gpu_parity.measure,
            gpu_parity.render,
        ),
        Section(
            "kernels",
            "The kernels' time against their floor and a plain torch loop",
            gpu_speed.measure,
            gpu_speed.render,
        ),
        Section(
            "graphs",
            "CUDA graphs against the same steps run eagerly",
            gpu_graphs.measure,
            gpu_graphs.render,
        ),
        Section("serving", "A server under load", gpu_serving.measure, gpu_serving.render),
    )
}
NO_GPU = (
    "gpu-check: torch finds no NVIDIA GPU here; check nvidia-smi, and that torch was installed with"
    " CUDA (torch.version.cuda)"
)


@dataclass(frozen=True, slots=True)
class Device:
    """What was checked.

    Attributes:
        name: As CUDA gives it.
        capability: Its compute capability.
        memory_bytes: Its memory.
        driver: NVIDIA's, as nvidia-smi says; None without that program.
        cuda: The version that torch was built for.
    """

    name: str
    capability: str
    memory_bytes: int
    driver: str | None
    cuda: str | None


def describe_device() -> Device:
    """The current GPU."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(
        name=found.name,
        capability=f"{found.major}.{found.minor}",
        memory_bytes=found.total_memory,
        driver=_driver(),
        cuda=torch.version.cuda,
    )


def check(names: Sequence[str], options: Options) -> Iterator[Outcome]:
    """One section after another, each in a process of its own."""
    for name in names:
        say(f"== {name}")
        outcome = _in_process(name, options)
        say(f"== {name}: {len(outcome.faults)} faults, {outcome.seconds:.0f} s")
        yield outcome


def run_section(name: str, options: Options) -> Outcome:
    """In this process."""
    return attempt(SECTIONS[name], options)


def report(device: Device, options: Options, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All that was found, as JSON has it."""
    return {
        "benchmark": "gpu-check",
        "machine": describe_machine(),
        "device": asdict(device),
        "versions": describe_versions("deltamux", "torch", "triton", "transformers"),
        "seed": options.seed,
        "base": options.base,
        "faults": sum(len(each.faults) for each in outcomes),
        "sections": {each.name: _section(each) for each in outcomes},
    }


def write_page(found: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """The report for people, in Markdown."""
    device, machine, versions = found["device"], found["machine"], found["versions"]
    faults = f"{found['faults']} faults" if found["faults"] else "nothing was wrong"
    header = ("section", "faults", "seconds")
    rows = [(each.name, str(len(each.faults)), f"{each.seconds:,.0f}") for each in outcomes]
    parts = [
        f"# GPU check: {device['name']}",
        f"In all: {faults}.",
        f"{device['name']}, compute capability {device['capability']},"
        f" {device['memory_bytes'] / 2**30:.0f} GiB, driver {device['driver'] or 'unknown'},"
        f" CUDA {device['cuda']}; {machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; seed {found['seed']}.",
        table(header, rows),
        *(_part(each) for each in outcomes),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: the exit status."""
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Check and measure deltamux on an NVIDIA GPU."
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), metavar="DIR")
    parser.add_argument("--base", default="smollm2", metavar="MODEL", help="that is served")
    parser.add_argument(
        "--most-adapters", type=int, default=128, metavar="N", help="that it is served with"
    )
    parser.add_argument(
        "--requests", type=int, default=512, metavar="N", help="that each run of it answers"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--section", action="append", choices=list(SECTIONS), help="only these; repeatable"
    )
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        say(NO_GPU)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    options = Options(
        given.out.resolve(), given.base, given.most_adapters, given.requests, given.seed
    )
    outcomes = list(check(given.section or list(SECTIONS), options))
    return finish(describe_device(), options, outcomes)


def finish(device: Device, options: Options, outcomes: Sequence[Outcome]) -> int:
    """Write the report and print its JSON: the exit status."""
    found = report(device, options, outcomes)
    page, line = options.out / "gpu-check.md", json.dumps(found)
    page.write_text(write_page(found, outcomes), "utf-8")
    (options.out / "gpu-check.json").write_text(line + "\n", "utf-8")
    say(f"{found['faults']} faults; the report is {page}")
    print(line)
    return 1 if found["faults"] else 0


def _in_process(name: str, options: Options) -> Outcome:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        running = process.submit(run_section, name, options)
        # What the section did not expect, and that its process ended, is told here.
        problem = running.exception()
    if problem is not None:
        return Outcome(name, 0.0, None, "".join(format_exception(problem)))
    return running.result()


def _section(outcome: Outcome) -> dict[str, Any]:
    return {
        "seconds": outcome.seconds,
        "faults": list(outcome.faults),
        "error": outcome.error,
        "result": None if outcome.result is None else asdict(outcome.result),
    }


def _part(outcome: Outcome) -> str:
    section = SECTIONS[outcome.name]
    parts = [f"## {section.title}"]
    if outcome.error:
        parts.append(f"It broke off:\n\n```\n{outcome.error.strip()}\n```")
    elif outcome.faults:
        shown = [f"- {each}" for each in outcome.faults[:SHOWN_FAULTS]]
        more = len(outcome.faults) - len(shown)
        parts.append("\n".join([*shown, *([f"- and {more} more"] if more else [])]))
    if outcome.result is not None:
        parts.append(section.render(outcome.result))
    return "\n\n".join(parts)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


if __name__ == "__main__":
    sys.exit(main())
