"""Steps that were recorded give what the same steps give unrecorded, to the last bit."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


@pytest.fixture(scope="module")
def transforms(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[int, Path]:
    """Three of FourierFT."""
    folder = tmp_path_factory.mktemp("transforms")
    modules = list(linear_modules(tiny_model("llama"), TARGETS))
    for index in (1, 2, 3):
        write_fourier(folder / str(index), modules, seed=index)
    return {index: folder / str(index) for index in (1, 2, 3)}


def write_fourier(folder: Path, modules: Sequence[tuple[str, int, int]], seed: int) -> None:
    """A random FourierFT as PEFT stores it."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        f"base_model.model.{path}.fourierft_spectrum": torch.randn(40, generator=rng)
        for path, _, _ in modules
    }
    config = {"peft_type": "FOURIERFT", "n_frequency": 40, "target_modules": TARGETS}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def outputs(model: Path, folders: Mapping[int, Path], dtype: str) -> dict[str, object]:
    """Tokens and log-probabilities of requests that come and go, some for adapters."""
    engine = EngineHarness(engine_config(model, dtype=dtype))
    try:
        for adapter_id, folder in folders.items():
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


@pytest.fixture(params=["loras", "transforms"])
def adapters(request: pytest.FixtureRequest) -> Mapping[int, Path]:
    folders: Mapping[int, Path] = request.getfixturevalue(request.param)
    return folders


def test_steps_with_prompts_are_made_again_for_other_numbers_of_rows(
    tiny_model: Callable[..., Path],
    adapters: Mapping[int, Path],
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
    outputs(tiny_model("llama"), adapters, "bfloat16")
    assert len({rows for rows in seen if rows is not None}) > 3
    assert seen.count(None) > 3, "decode steps are recorded, too"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_give_the_same_bits(
    tiny_model: Callable[..., Path],
    adapters: Mapping[int, Path],
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = outputs(tiny_model("llama"), adapters, dtype)
    monkeypatch.setattr("deltamux.server.engine.build._graphs", lambda *_: None)
    monkeypatch.setattr("deltamux.server.engine.build._prompts", lambda *_: None)
    assert recorded == outputs(tiny_model("llama"), adapters, dtype)
    assert len(recorded) == 12
