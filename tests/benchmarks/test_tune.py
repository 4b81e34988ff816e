"""The tuner with a timer that only says which configuration is to win, and what comes of it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.errors import OutOfResources

from deltamux.benchmarks import gpu_speed, tune_problems
from deltamux.benchmarks.errors import BenchmarkError
from deltamux.benchmarks.gpu_case import Load
from deltamux.benchmarks.gpu_cases import all_cases
from deltamux.benchmarks.gpu_operands import Operands
from deltamux.benchmarks.tune import DTYPE, INDEX_BYTES, POOL_BYTES, measured_of, report, run, tune
from deltamux.benchmarks.tune_problems import Grid, Point, Tunable, points, tunables
from deltamux.kernels.affine.gpu import CONFIGS, CORRECT_AFFINE, choose_config
from deltamux.kernels.gpu.backend import triton_backend
from deltamux.kernels.gpu.production import OPERATIONS
from deltamux.kernels.gpu.shapes import LLAMA_8B, Shapes
from deltamux.kernels.gpu.tuning import Choice, Key, read_measured, tuning_file
from deltamux.server.cli import cli

from ..server.test_cuda_trace import CUDA, device_guard

TINY = Shapes("tiny", 1, 64, 96, 4, 2, 16, 120)
GRID = Grid(rows=(1, 4), inner=(8,), contexts=(16,), step=2, bases=(TINY,))
NAMES = [each.name for each in tunables()]


@pytest.fixture
def operands() -> Operands:
    return Operands(1 << 22, 1 << 18, torch.bfloat16, torch.device("cpu"), seed=0)


def last_is_fastest(call: Callable[[], object]) -> float:
    """The tuner calls a launch with the index of a configuration."""
    assert isinstance(call, partial)
    return 100.0 - call.args[0]


def test_a_size_stands_for_those_below_it_down_to_the_next() -> None:
    assert points((1, 16, 64)) == [
        Point(1, (1,)), Point(16, (2, 4, 8, 16)), Point(64, (32, 64)),
    ]  # fmt: skip
    assert points((8, 16))[0] == Point(8, (1, 2, 4, 8))


def test_every_operation_with_a_choice_is_tuned() -> None:
    assert set(NAMES) <= OPERATIONS.keys()
    several = {
        name
        for name in OPERATIONS
        if name.startswith(("add_", "correct_affine", "replace_outputs", "paged"))
    }
    # Spectral corrections choose by add_sparse; side attention has nothing to choose.
    assert several - set(NAMES) == {"add_spectral", "add_side_attention"}


@pytest.mark.parametrize("operation", tunables(), ids=NAMES)
def test_operands_fit_the_launches(operation: Tunable, operands: Operands) -> None:
    """Of the first site of every key, under the interpreter."""
    problems = operation.problems(GRID)
    for problem in problems:
        operands.reset()
        problem.builds[0](operands)(0)
    assert {problem.key.rows for problem in problems} >= {1, 4}


def test_real_sizes_fit_the_pool_and_lie_on_the_gpu(monkeypatch) -> None:
    """On a device without memory: every key that is tuned, and every case of a check."""
    monkeypatch.setattr(torch, "Generator", lambda *_: SimpleNamespace(manual_seed=lambda _: None))
    monkeypatch.setattr(tune_problems, "run_all", list)
    with device_guard(), FakeTensorMode(allow_non_fake_inputs=True):
        operands = Operands(POOL_BYTES, INDEX_BYTES, DTYPE, CUDA, seed=0)
        for operation in tunables():
            for problem in operation.problems(Grid()):
                for build in problem.builds[-1:]:  # of the largest base
                    operands.reset()
                    assert build(operands)(0)
        operands = Operands(gpu_speed.POOL_BYTES, gpu_speed.INDEX_BYTES, DTYPE, CUDA, seed=0)
        backend = triton_backend({})
        for build_case in all_cases(LLAMA_8B, Load()):
            operands.reset()
            build_case(operands).run(backend)


def test_the_server_takes_what_was_fastest(
    operands: Operands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tuning_file("NVIDIA H100 80GB HBM3", tmp_path)
    chosen = list(tune(tunables(), GRID, operands, last_is_fastest))
    before = {"correct_affine": {Key(1, 1, 1): 2}, "other": {Key(9, 9, 9): 3}}
    report(chosen, before, path, "NVIDIA H100 80GB HBM3", seed=0)
    measured = read_measured(path)
    assert measured == {**before, **measured_of(chosen)}
    assert measured.keys() == {*NAMES, "other"}
    choice = Choice("correct_affine", choose_config, len(CONFIGS), measured)
    for rows, rank, size in ((1, 8, 64), (3, 5, 64), (4, 1, 96)):
        assert choice(Key.of(rows, rank, size)) == len(CONFIGS) - 1
    assert choice(Key.of(5, 8, 64)) == choose_config(Key.of(5, 8, 64)), "that was not measured"
    triton_backend(measured)
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert {"machine", "versions", "device", "seed", "file"} <= found.keys()
    assert len(found["chosen"]) == len(chosen)
    assert lines[0].startswith("| operation ")
    assert f"written to {path}" in lines


def test_a_decode_step_of_an_8b_base_is_among_the_measured() -> None:
    keys = {
        each.name: {key for problem in each.problems(Grid()) for key in problem.keys}
        for each in tunables()
    }
    for rows in (1, 2, 8, 64, 512, 2048):
        for size in (2048, 4096, 8192, 14_336, 28_672):
            assert all(Key.of(rows, rank, size) in keys["correct_affine"] for rank in (1, 16, 200))
            assert Key.of(rows, 0, size) in keys["add_dense"]
        assert Key.of(rows, 4096, 4096) in keys["add_kronecker"]
        assert Key.of(rows, 48, 4096) in keys["add_bottleneck"]
        for head_dim in (64, 128):
            assert Key.of(rows, 1024, head_dim) in keys["paged_attention"]
            assert Key.of(rows, 9000, head_dim) in keys["paged_attention"]


def test_what_does_not_fit_the_device_is_not_chosen(operands: Operands) -> None:
    affine = next(each for each in tunables() if each.name == "correct_affine")

    def timer(call: Callable[[], object]) -> float:
        assert isinstance(call, partial)
        if call.args[0] > 2:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return last_is_fastest(call)

    assert {each.config for each in tune([affine], GRID, operands, timer)} == {2}


def test_a_file_of_another_version_is_refused() -> None:
    stale = {"correct_affine": {Key(1, 16, 4096): len(CONFIGS)}}
    words = rf"correct_affine has {len(CONFIGS)} configurations.*names number {len(CONFIGS)}.*again"
    for use in (triton_backend, CORRECT_AFFINE.tuned):
        with pytest.raises(ValueError, match=words):
            use(stale)
    for name in NAMES:
        with pytest.raises(ValueError, match=rf"{name} has \d+ configurations.*--tune again"):
            triton_backend({name: {Key(1, 16, 4096): -1}})


def test_it_needs_a_gpu_and_an_operation(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in (
        (["--tune"], "needs an NVIDIA GPU"),
        (["--tune", "--filter", "nonsense"], "there are: correct_affine"),
        (["--tune", "--compile-only"], "give one of them"),
    ):
        result = CliRunner().invoke(cli, ["bench", "kernels", *arguments])
        assert result.exit_code == 2
        assert words in result.output
    with pytest.raises(BenchmarkError, match="needs an NVIDIA GPU"):
        run()
