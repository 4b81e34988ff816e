"""Every GPU kernel, compiled for every target in processes that interpret none of them."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from deltamux.benchmarks.compile_kernels import (
    Row,
    compile_all,
    fault_lines,
    jobs_of,
    report,
    served_operations,
)
from deltamux.kernels.gpu.compile import TARGETS, Compiled, compile_launch, faults_of
from deltamux.kernels.gpu.production import OPERATIONS
from deltamux.kernels.gpu.shapes import LLAMA_8B

PLANTED = Path(__file__).with_name("planted.py")


def test_every_kernel_compiles_for_every_target_without_fault() -> None:
    jobs = jobs_of(dtypes=(torch.bfloat16,))
    rows = compile_all(jobs)
    sys.stdout.write(f"{len(rows)} compiled\n")
    assert [line for row in rows for line in fault_lines(row)] == []
    assert {row.target for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert os.environ["TRITON_INTERPRET"] == "1"  # here, again


def test_every_operation_has_launches_and_none_is_compiled_twice() -> None:
    of_operations = {name: list(OPERATIONS[name](LLAMA_8B, torch.float16)) for name in OPERATIONS}
    assert all(of_operations.values())
    jobs = jobs_of(dtypes=(torch.float16,))
    assert len(jobs) <= len(TARGETS) * sum(map(len, of_operations.values()))
    assert set(Counter(jobs).values()) == {1}


def test_equal_specialisations_are_one_job() -> None:
    once = jobs_of(dtypes=(torch.float16,))
    assert jobs_of(dtypes=(torch.float16, torch.float16)) == once


def test_a_filter_keeps_the_operations_that_contain_it() -> None:
    found = {job.operation for job in jobs_of(served_operations, text="affine")}
    assert found == {name for name in OPERATIONS if "affine" in name}
    assert jobs_of(text="no such operation") == []


@pytest.fixture(scope="module")
def planted() -> list[str]:
    """The faults of three planted kernels for three targets."""
    done = subprocess.run(
        [sys.executable, str(PLANTED)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        ("spilling", "spills"),
        ("vector", "multiplies without matrix instructions"),
        ("broken", "does not compile"),
    ],
)
def test_planted_faults_are_found(planted: list[str], operation: str, fault: str) -> None:
    found = [line for line in planted if line.startswith(f"fault: {operation}, ")]
    assert len(found) == len(TARGETS)
    assert all(fault in line for line in found)


def test_too_much_shared_memory_is_a_fault() -> None:
    target = TARGETS[0]
    compiled = Compiled("kernel", target.name, 32, 0, target.shared_bytes, "mma.sync")
    assert faults_of(compiled, target, matrix=True) == []
    over = Compiled("kernel", target.name, 32, 0, target.shared_bytes + 1, "")
    (fault,) = faults_of(over, target, matrix=False)
    assert fault == "needs 166913 bytes of shared memory; there are 166912"


def test_interpreted_kernels_are_not_compiled() -> None:
    launch = next(iter(OPERATIONS["correct_affine"](LLAMA_8B, torch.float16)))
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        compile_launch(launch, TARGETS[0])


def test_the_report_counts_faults_and_ends_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    good = Compiled("kernel", "sm_80", 40, 0, 1024, "mma.sync")
    rows = [
        Row("op", "kernel", "ROWS=1 warps=4 stages=2", "bfloat16", "sm_80", good, ()),
        Row("op", "kernel", "ROWS=2 warps=4 stages=2", "bfloat16", "sm_80", None, ("breaks",)),
    ]
    assert report(rows) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert "| kernel | ROWS=1 warps=4 stages=2 | bfloat16 | sm_80  |" in lines[4]
    assert "fault: op, kernel (ROWS=2 warps=4 stages=2), bfloat16, sm_80: breaks" in lines
    found = json.loads(last)
    assert {"machine", "versions"} <= found.keys()
    assert found["versions"]["triton"]
    assert [row["faults"] for row in found["rows"]] == [[], ["breaks"]]
