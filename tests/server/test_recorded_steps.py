"""Steps that were recorded give what the same steps give unrecorded, to the last bit."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from deltamux.benchmarks.make_adapters import linear_modules, random_lora, write_adapter
from deltamux.kernels.backend import compiled_backend
from deltamux.kernels.cpu.program import Program
from deltamux.server.generation import AdapterWeight

from .harness import EngineHarness, engine_config, make_request

TARGETS = ["q_proj", "v_proj", "down_proj"]
RANKS = (2, 5, 16)


@pytest.fixture(scope="module")
def loras(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[int, Path]:
    folder = tmp_path_factory.mktemp("loras")
    modules = list(linear_modules(tiny_model("llama"), TARGETS))
    for index, rank in enumerate(RANKS, 1):
        tensors = random_lora(modules, rank, torch.float32, seed=rank)
        write_adapter(folder / str(index), tensors, rank, TARGETS)
    return {index: folder / str(index) for index in range(1, len(RANKS) + 1)}


def outputs(model: Path, loras: Mapping[int, Path], dtype: str) -> dict[str, object]:
    """Tokens and log-probabilities of requests that come and go, some for adapters."""
    engine = EngineHarness(engine_config(model, dtype=dtype))
    try:
        for adapter_id, folder in loras.items():
            engine.load(adapter_id, folder)
        for number in range(12):
            adapters = [AdapterWeight(number % 4)] if number % 4 else []
            prompt = [(7 * number + 3 * i) % 290 + 3 for i in range(5 + 4 * number)]
            changes = {"max_tokens": 9 + 5 * (number % 3), "logprobs": 2}
            engine.submit(make_request(str(number), prompt, adapters=adapters, **changes))
            engine.step()
        received = engine.run()
        return {name: (each.token_ids, each.logprobs) for name, each in received.items()}
    finally:
        engine.close()


def test_steps_with_prompts_are_made_again_for_other_numbers_of_rows(
    tiny_model: Callable[..., Path],
    loras: Mapping[int, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not compiled_backend().leaves_out_rows:
        pytest.skip("only products on a matrix unit leave rows out")
    seen: list[int | None] = []
    replay = Program.replay

    def watched(program: Program, rows: int | None = None) -> torch.Tensor:
        seen.append(rows)
        return replay(program, rows)

    monkeypatch.setattr(Program, "replay", watched)
    outputs(tiny_model("llama"), loras, "bfloat16")
    assert len({rows for rows in seen if rows is not None}) > 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_give_the_same_bits(
    tiny_model: Callable[..., Path],
    loras: Mapping[int, Path],
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = outputs(tiny_model("llama"), loras, dtype)
    monkeypatch.setattr("deltamux.server.engine.build._graphs", lambda *_: None)
    monkeypatch.setattr("deltamux.server.engine.build._prompts", lambda *_: None)
    assert recorded == outputs(tiny_model("llama"), loras, dtype)
    assert len(recorded) == 12
