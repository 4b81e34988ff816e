"""The profile of a step: its stages add up, nested ones are counted once, and it runs for real."""

import json

import pytest
import torch

from deltamux.benchmarks.step import Stopwatch, Workload, instrumented, run
from deltamux.kernels.backend import reference_backend
from deltamux.kernels.tables import PrimitiveTable, Segments


def test_a_stage_within_another_is_counted_once():
    times = iter([0.0, 1.0, 3.0, 4.0, 9.0, 10.0])
    watch = Stopwatch(lambda: next(times))
    with watch.stage("outer"):
        inner = watch.around("inner", lambda: None)
        inner()
        inner()
    assert watch.take() == {"inner": 7.0, "outer": 3.0}
    assert watch.take() == {}


def test_what_raises_is_timed_too():
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch.stage("broken"):
        _ = 1 / 0
    assert watch.take().keys() == {"broken"}


def test_every_operation_of_a_backend_is_timed():
    watch = Stopwatch()
    backend = instrumented(reference_backend(), watch)
    linear = backend.prepare_linear(torch.ones(3, 2), None)
    assert linear(torch.ones(1, 2)).tolist() == [[2.0, 2.0, 2.0]]
    backend.silu_mul(torch.ones(1, 4))
    backend.deltas.override_norm(*norm_operands())
    assert watch.take().keys() == {"linear 2 -> 3", "silu_mul", "override_norm"}


def norm_operands():
    words = torch.zeros(16, dtype=torch.int32)
    table = PrimitiveTable(torch.full((1, 1, 2), -1), words.view(torch.float32), words)
    return torch.ones(1, 4), torch.ones(1, 4), table, 0, Segments.of([(0, 1, 0, 1.0)]), 1e-5, False


@pytest.mark.parametrize("adapters", [0, 2])
def test_the_stages_add_up_to_the_step(tiny_model, capsys, adapters):
    workload = Workload(
        base=str(tiny_model("llama")),
        dtype="float32",
        kernels="auto",
        rows=3,
        context=9,
        adapters=adapters,
        rank=4,
        steps=4,
        threads=1,
        seed=0,
    )
    run(workload)
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    for kind in ("prefill_ms", "decode_ms"):
        found = report[kind]
        assert sum(found["stages"].values()) == pytest.approx(found["step"], rel=0.05)
    assert ("correct_affine" in report["decode_ms"]["stages"]) == bool(adapters)
    assert report["decode_floor_ms"] > 0
    assert any(line.startswith("decode floor") for line in lines)
