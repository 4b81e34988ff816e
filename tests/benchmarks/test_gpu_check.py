"""The GPU check without a GPU: what it would time, how it compares, and what it reports."""

import json
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltamux.adapters.lower import lower
from deltamux.benchmarks import gpu_check, gpu_parity, gpu_serving
from deltamux.benchmarks.counting import Work
from deltamux.benchmarks.gpu_case import Case, Load
from deltamux.benchmarks.gpu_cases import all_cases
from deltamux.benchmarks.gpu_check import SECTIONS, Device, finish
from deltamux.benchmarks.gpu_graphs import BatchResult, Graphs, Trial, compare, install
from deltamux.benchmarks.gpu_operands import Operands
from deltamux.benchmarks.gpu_parity import FileResult, Parity, read_junit
from deltamux.benchmarks.gpu_section import Options, Outcome, Section, attempt
from deltamux.benchmarks.gpu_serving import Run, Serving, read_run
from deltamux.benchmarks.gpu_speed import Speed, Timing, difference, time_cases
from deltamux.benchmarks.gpu_timing import Rates
from deltamux.benchmarks.load.results import Figures, Generator, Latencies, Results
from deltamux.benchmarks.make_adapters import linear_modules, random_lora, write_adapter
from deltamux.kernels.backend import Backend, DeltaOps, reference_backend
from deltamux.kernels.gpu.backend import interpreted_backend
from deltamux.kernels.gpu.shapes import Shapes
from deltamux.server.model.base import load_base
from deltamux.server.runner.graphs import StepGraphs

CPU = torch.device("cpu")
RATES = Rates(bytes_per_second=1e9, flops_per_second=1e12, replay_us=3.0)
TINY = Shapes("tiny", 3, 64, 96, 4, 2, 16, 120)
LOAD = Load(
    rows=4, prompt=6, counts=(2,), ranks=(3,), adapters=2, contexts=(20,), block=16, width=8,
    tokens=10,
)  # fmt: skip


@pytest.fixture
def operands() -> Operands:
    return Operands(1 << 21, 1 << 16, torch.bfloat16, CPU, seed=0)


# ---- operands and cases


def test_tensors_of_the_pool_are_aligned_and_go_round(operands: Operands) -> None:
    first = operands.numbers(100)
    assert (2 * first) % 64 == 0
    assert operands.numbers(7) * 2 == 2 * first + 256
    assert operands.taken_bytes == 214
    last = [operands.numbers(1 << 18) for _ in range(4)]
    assert last.count(first) == 1, "what does not fit begins anew"
    with pytest.raises(ValueError, match="does not fit"):
        operands.numbers(1 << 21)


def test_indices_lie_before_the_numbers(operands: Operands) -> None:
    at = [operands.indices(torch.arange(5)) for _ in range(2)]
    assert at == [0, 16]
    table = operands.table([[(0,)]])
    assert table.indices[16:21].tolist() == list(range(5))
    assert 2 * operands.numbers(3) >= (1 << 16)
    with pytest.raises(ValueError, match="more indices"):
        operands.indices(torch.arange(1 << 14))
    operands.reset()
    assert operands.indices(torch.arange(3)) == operands.taken_bytes - 12 == 0


def test_every_operation_has_cases_whose_results_are_the_references(operands: Operands) -> None:
    """All of them under the interpreter; the times mean nothing."""
    backends = interpreted_backend(), reference_backend()

    def once(call: Callable[[], object]) -> float:
        return 1.0

    timings = list(time_cases(operands, backends, RATES, (once, once), TINY, LOAD))
    assert [each.fault for each in timings if each.fault] == []
    there = {field.name for kind in (Backend, DeltaOps) for field in fields(kind)}
    untimed = {"name", "deltas", "pads_decode", "prepare_linear", "programs", "leaves_out_rows"}
    untimed |= {"gather_rows", "largest"}  # torch's own
    assert {each.operation for each in timings} == there - untimed
    assert all(each.num_bytes > 0 for each in timings)


def test_a_loras_bytes_are_those_of_its_tensors_and_rows(operands: Operands) -> None:
    case = next(all_cases(TINY, LOAD))(operands)
    rows = 4 * (64 + 2 * 128 + 64 + 2 * 64 + 64 + 2 * 192 + 96 + 2 * 64)
    assert case.work.num_bytes == operands.taken_bytes + 2 * rows
    assert case.work.flops == 2 * 4 * operands.taken_bytes // 2 // 2


def test_the_floor_is_the_longer_of_two_times() -> None:
    assert RATES.floor_us(num_bytes=1000, flops=1000) == pytest.approx(1.0)
    assert RATES.floor_us(num_bytes=1000, flops=5_000_000) == pytest.approx(5.0)


def adding(amount: float) -> Case:
    """Adds one, and what is given more in all operations of a backend called 'wrong'."""
    y = torch.zeros(4)

    def run(backend: Backend) -> Tensor | None:
        y.add_(1 + amount * (backend.name == "wrong"))
        return None

    return Case("adding", "four numbers", run, Work(16), (y,))


def test_results_are_compared_from_the_same_start() -> None:
    right = reference_backend()
    wrong = replace(right, name="wrong")
    assert difference(adding(0.5), (right, right)) == 0
    assert difference(adding(0.5), (wrong, right)) == pytest.approx(0.5)
    assert difference(adding(float("nan")), (wrong, right)) is None


def test_a_wrong_result_and_a_broken_case_are_faults() -> None:
    good = Timing("op", "case", 2.0, 8.0, 1.0, 100, 0.001)
    assert good.fault == ""
    assert "differs" in replace(good, difference=0.5).fault
    assert "differs" in replace(good, difference=None).fault
    broken = replace(good, us=None, error="Traceback\nRuntimeError: an illegal access\n")
    assert broken.fault == "op, case: RuntimeError: an illegal access"
    assert Speed("8B", "bfloat16", RATES, (good, broken)).faults == [broken.fault]


# ---- graphs


class NoGraphs(StepGraphs):
    """Steps as they are, but for one with other logits."""

    def __init__(self, change: float = 0.0) -> None:
        self.steps = 0
        self.change = change

    def run(self, shape: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        self.steps += 1
        return compute() * (1 + self.change * (self.steps == 2))


@pytest.fixture(scope="module")
def loras(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    folder, targets = tmp_path_factory.mktemp("loras"), ["q_proj", "down_proj"]
    modules = list(linear_modules(tiny_model("llama"), targets))
    for rank in (2, 5):
        write_adapter(
            folder / f"rank-{rank}",
            random_lora(modules, rank, torch.float32, seed=rank),
            rank,
            targets,
        )
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("change", [0.0, 0.25])
def test_two_runners_are_compared_token_by_token(
    tiny_model: Callable[..., Path], loras: Mapping[str, Path], change: float
) -> None:
    backend = reference_backend()
    base = load_base(tiny_model("llama"), torch.float32, CPU, backend)
    adapters = {name: lower(path, base, 1 << 20) for name, path in loras.items()}
    model = install(base, backend, adapters, CPU)
    graphs, trial = NoGraphs(change), Trial(sizes=(2,), steps=2, prompt=3)
    batches = list(compare(model, graphs, lambda: graphs.steps, trial))
    assert [each.batch for each in batches] == ["the base", "rank-2", "base and adapters in turn"]
    assert [each.replays for each in batches] == [2, 2, 2]
    assert [each.tokens for each in batches] == [6, 6, 6]
    found = [len(each.differences) for each in batches]
    assert found == [2 if change else 0, 0, 0]
    if change:
        assert batches[0].differences[0].startswith("step 2, row 0: ")


def test_nothing_replayed_is_a_fault() -> None:
    batch = BatchResult("the base", 2, 6, 0, ())
    assert Graphs("smollm2", (), (batch,)).faults == ["nothing replayed"]
    assert Graphs("smollm2", (), (replace(batch, replays=1),)).faults == []


# ---- parity and serving

JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" tests="3" time="2.5">
<testcase classname="tests.kernels.test_b" name="test_good[interpreted]" time="1.25" />
<testcase classname="tests.kernels.test_b" name="test_bad[interpreted]" time="1.0">
<failure message="AssertionError: 3 &lt; 2&#10;assert False">long</failure></testcase>
<testcase classname="tests.kernels.test_a" name="test_broken" time="0.25"><error message="">no GPU
at all</error></testcase>
</testsuite></testsuites>"""


def test_pytests_report_is_read() -> None:
    results = read_junit(JUNIT)
    assert results == [
        FileResult("test_a.py", 1, ("test_broken: no GPU",), 0.2),
        FileResult("test_b.py", 2, ("test_bad[interpreted]: AssertionError: 3 < 2",), 2.2),
    ]
    assert Parity(tuple(results)).faults == [
        "test_a.py: test_broken: no GPU",
        "test_b.py: test_bad[interpreted]: AssertionError: 3 < 2",
    ]
    assert Parity(()).faults == ["no test ran"]


def test_tests_run_in_processes_that_interpret_nothing(monkeypatch, tmp_path: Path) -> None:
    """A file without tests is none of the report; a test that ends its process fails alone."""
    folder = tmp_path / gpu_parity.TESTS
    folder.mkdir(parents=True)
    for name, body in {
        "test_a.py": "assert os.environ['DELTAMUX_TEST_GPU'] == '1'",
        "test_b.py": "assert 'TRITON_INTERPRET' in os.environ",
    }.items():
        (folder / name).write_text(f"import os\n\ndef test_it():\n    {body}\n")
    (folder / "test_c.py").write_text("")
    (folder / "test_d.py").write_text(
        "import os\n\ndef test_end():\n    os._exit(1)\n\ndef test_after():\n    pass\n"
    )
    monkeypatch.setattr(gpu_parity, "ROOT", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert os.environ["TRITON_INTERPRET"] == "1"
    found = gpu_parity.measure(Options(tmp_path))
    assert [(each.file, each.tests, len(each.failed)) for each in found.files] == [
        ("test_a.py", 1, 0),
        ("test_b.py", 1, 1),
        ("test_d.py", 2, 1),
    ]
    assert "crashed while running" in found.faults[1]


def test_the_load_generators_line_is_read() -> None:
    latencies = Latencies(mean=2.0, p50=1.0, p90=2.0, p99=3.0, max=4.0)
    total = Figures(
        completed=9, failed=1, output_tokens=90, prompt_tokens=90, prompts_unknown=0,
        requests_per_second=1.0, output_tokens_per_second=10.5, total_tokens_per_second=21.0,
        ttft_ms=latencies, itl_ms=latencies, tpot_ms=latencies, e2e_ms=latencies, goodput=None,
    )  # fmt: skip
    results = Results(9.0, total, {}, {}, {}, {}, {}, Generator(1.0, 0.1, None, None))
    run = read_run(8, json.dumps({"results": asdict(results)}))
    assert run == Run(8, 9, 1, 10.5, 1.0, 3.0, 1.0, 3.0)
    serving = Serving("smollm2", 16, 1 << 20, 64, 128, 128, (replace(run, failed=0), run))
    assert serving.faults == ["8 adapters: 1 of 10 requests failed"]


def test_adapters_fit_the_servers_budgets(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    num_bytes = gpu_serving.make_adapters(tiny_model("llama"), tmp_path, 2, seed=0)
    folders = sorted(tmp_path.iterdir())
    assert [each.name for each in folders] == ["synthetic-000", "synthetic-001"]
    size = (folders[0] / "adapter_model.safetensors").stat().st_size
    assert num_bytes < size < num_bytes + 8192
    _, device, _, host = gpu_serving.server_flags(128 * 84_000_000)
    assert int(device) // 4 >= 128 * 84_000_000
    assert int(host) >= 128 * 84_000_000
    with pytest.raises(ValueError, match="no module is called"):
        gpu_serving.make_adapters(tiny_model("gpt2"), tmp_path, 1, seed=0)


def test_a_server_that_does_not_start_tells_why(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with (
        pytest.raises(RuntimeError, match="No such option '--no-such-option'"),
        gpu_serving.running("smollm2", ["--no-such-option"], log),
    ):
        pass


# ---- the whole check

DEVICE = Device("NVIDIA H100", "9.0", 80 << 30, "570.1", "12.8")
RESULTS = {
    "parity": Parity((FileResult("test_affine.py", 100, (), 9.5),)),
    "kernels": Speed(
        "8B",
        "bfloat16",
        RATES,
        (Timing("correct_affine", "a layer", 20.0, 800.0, 10.0, 30_000_000, 0.003),),
    ),
    "graphs": Graphs("smollm2", ("butler",), (BatchResult("the base", 64, 448, 5, ()),)),
    "serving": Serving(
        "smollm2", 16, 9_000_000, 64, 128, 128,
        (
            Run(0, 512, 0, 10_000.0, 20.0, 40.0, 5.0, 9.0),
            Run(32, 512, 0, 9_000.0, 25.0, 50.0, None, None),
        ),
    ),
}  # fmt: skip


def outcomes() -> list[Outcome]:
    return [Outcome(name, 60.0, result) for name, result in RESULTS.items()]


def test_the_report_holds_every_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert SECTIONS.keys() == RESULTS.keys()
    assert finish(DEVICE, Options(tmp_path, seed=3), outcomes()) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "gpu-check.json").read_text() == line + "\n"
    found = json.loads(line)
    assert {"machine", "device", "versions", "sections"} <= found.keys()
    assert (found["seed"], found["faults"], found["device"]["driver"]) == (3, 0, "570.1")
    assert found["versions"].keys() >= {"torch", "triton"}
    assert found["sections"]["kernels"]["result"]["timings"][0]["us"] == 20.0
    page = (tmp_path / "gpu-check.md").read_text()
    assert "nothing was wrong" in page
    for text in (
        *(section.title for section in SECTIONS.values()),
        "| test_affine.py |   100 |      0 |     9.5 |",
        "| 20.0 | 1,500 |      10.0 |                     50 |            800 |         40.0 |",
        "| the base    |        64 |             448 |              5 |           0 |",
        "|       32 |           9,000 |         0.900 |",
    ):
        assert text in page, page


def test_what_is_wrong_makes_the_status_1(tmp_path: Path) -> None:
    failed = tuple(f"test_{number}: no" for number in range(30))
    broken = [
        Outcome("parity", 1.0, Parity((FileResult("test_affine.py", 40, failed, 1.0),))),
        Outcome("kernels", 1.0, None, "Traceback\nRuntimeError: an illegal access"),
    ]
    assert finish(DEVICE, Options(tmp_path), broken) == 1
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert found["faults"] == 31
    assert len(found["sections"]["parity"]["faults"]) == 30
    page = (tmp_path / "gpu-check.md").read_text()
    assert "31 faults" in page
    assert "- test_affine.py: test_19: no\n- and 10 more" in page
    assert "```\nTraceback\nRuntimeError: an illegal access\n```" in page


def _illegal(_: Options) -> Parity:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_section_that_breaks_off_says_why(tmp_path: Path) -> None:
    outcome = attempt(Section("parity", "Tests", _illegal, str), Options(tmp_path))
    assert outcome.result is None
    assert outcome.faults == ["it broke off"]
    assert "RuntimeError: CUDA error: an illegal memory access" in outcome.error
    assert "_illegal" in outcome.error


def test_a_section_has_a_process_of_its_own_whose_end_is_a_fault(
    monkeypatch, tmp_path: Path
) -> None:
    """Where there is no GPU, operands on one are what it breaks off at."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (outcome,) = gpu_check.check(["kernels"], Options(tmp_path))
    assert outcome.faults == ["it broke off"]
    assert "CUDA" in outcome.error
    assert "gpu_speed.py" in outcome.error


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == gpu_check.NO_GPU + "\n"
