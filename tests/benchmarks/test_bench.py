"""What ``deltamux bench`` makes of its arguments, without measuring much."""

import json
import sys

import pytest
from click.testing import CliRunner

from deltamux.benchmarks import compile_kernels, kernels
from deltamux.benchmarks.kernels import Case
from deltamux.benchmarks.markdown import table
from deltamux.server.cli import cli


def bench(*arguments: str) -> tuple[int, str]:
    """Exit status and output."""
    result = CliRunner().invoke(cli, ["bench", *arguments])
    return result.exit_code, result.output


def test_help_names_every_benchmark() -> None:
    code, output = bench("--help")
    assert code == 0
    assert all(name in output for name in ("kernels", "roofline", "serve", "compare", "step"))


def test_unknown_benchmarks_are_refused() -> None:
    code, output = bench("nonsense")
    assert code == 2
    assert "nonsense" in output


@pytest.mark.parametrize("faults", [0, 3])
def test_compile_only_exits_with_1_for_faults(monkeypatch, faults: int) -> None:
    asked: list[str] = []

    def run(text: str) -> int:
        asked.append(text)
        return faults

    monkeypatch.setattr(compile_kernels, "run", run)
    code, _ = bench("kernels", "--compile-only", "--filter", "affine")
    assert (code, asked) == (min(faults, 1), ["affine"])


def test_a_filter_that_nothing_passes_is_an_error_of_use() -> None:
    code, output = bench("kernels", "--compile-only", "--filter", "nonsense")
    assert code == 2
    assert "there are: correct_affine" in output


def test_the_cases_that_a_filter_names_are_timed(monkeypatch) -> None:
    ran: list[int] = []
    cases = [
        Case("wanted", lambda backend, layer: ran.append(layer), num_bytes=10),
        Case("other", lambda backend, layer: pytest.fail("it was not asked for")),
    ]
    monkeypatch.setattr(kernels, "cases", lambda: iter(cases))
    monkeypatch.setattr(kernels, "read_bandwidth", lambda: 1e9)
    code, output = bench("kernels", "--filter", "want")
    assert (code, set(ran)) == (0, set(range(kernels.LAYERS)))
    report = json.loads(output.splitlines()[-1])
    assert [each["name"] for each in report["timings"]] == ["wanted"]
    assert report["timings"][0]["floor_us"] == pytest.approx(0.01)
    assert {"machine", "versions"} <= report.keys()


@pytest.mark.parametrize(
    ("package", "module", "arguments"),
    [
        ("rich", "compile_kernels", ["kernels", "--compile-only"]),
        ("matplotlib", "roofline_plot", ["roofline", "--plot", "plot.png"]),
    ],
)
def test_a_missing_extra_is_told(
    monkeypatch, package: str, module: str, arguments: list[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"deltamux.benchmarks.{module}", raising=False)
    code, output = bench(*arguments)
    assert code == 2
    assert "is not installed; run: pip install 'deltamux[bench]'" in output


def test_tables_are_aligned_markdown() -> None:
    assert table(("name", "µs"), [("a", "1,000"), ("long name", "-")]).splitlines() == [
        "| name      |    µs |",
        "|-----------|------:|",
        "| a         | 1,000 |",
        "| long name |     - |",
    ]
