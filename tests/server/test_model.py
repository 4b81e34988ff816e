"""The decoder against transformers, in every family, over a paged cache and mixed batches."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltamux.kernels.backend import Backend, reference_backend, select_backend
from deltamux.kernels.linear.op import LinearOp
from deltamux.kernels.tables import SiteTargets
from deltamux.server.model.base import load_base
from deltamux.server.model.decoder import Decoder
from deltamux.server.model.loader import load_model

from .paged_run import PagedRun, random_schedule

TinyModel = Callable[..., Path]
CPU = torch.device("cpu")
TOLERANCE = 1e-4
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one KV head, tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama narrow head": ("llama", {"head_dim": 8}),
    "llama linear rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama sharded": ("llama", {"max_shard_size": "50KB"}),
    "llama3": ("llama3", {}),
    "llama3 untied": ("llama3", {"tie_word_embeddings": False}),
    "mistral": ("mistral", {}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 window in one layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 biases, untied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", {}),
    "gpt2 gelu, sharded": (
        "gpt2",
        {"activation_function": "gelu", "n_inner": 48, "max_shard_size": "50KB"},
    ),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On GEMMs this small a pool of threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["reference", "auto"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return select_backend(request.param, torch.float32, CPU)


def load(
    folder: Path, dtype: torch.dtype = torch.float32, backend: Backend | None = None
) -> Decoder:
    return load_model(folder, dtype, torch.device("cpu"), backend or reference_backend())


def oracle(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def oracle_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


def random_sequences(lengths: list[int], rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(300) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_mixed_chunked_batches_equal_transformers(
    variant: str, backend: Backend, tiny_model: TinyModel
) -> None:
    family, overrides = VARIANTS[variant]
    folder = tiny_model(family, **overrides)
    model, rng = oracle(folder), random.Random(variant)
    lengths = [61, 1, 37, 90, 5]
    sequences = random_sequences(lengths, rng)
    expected = [oracle_logits(model, tokens) for tokens in sequences]
    run = PagedRun(load(folder, backend=backend), sequences, block_size=4)

    for chunks in random_schedule(lengths, rng, largest_chunk=30):
        for (index, start, end), logits in zip(chunks, run.step(chunks), strict=True):
            torch.testing.assert_close(logits, expected[index][start:end], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gpt2"])
def test_bfloat16_stays_close_to_transformers(family: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(family)
    tokens = random_sequences([60], random.Random(1))[0]
    expected = oracle_logits(oracle(folder, torch.bfloat16), tokens).log_softmax(-1)
    run = PagedRun(load(folder, torch.bfloat16), [tokens], block_size=16)
    logprobs = run.step([(0, 0, 60)])[0].log_softmax(-1)
    assert (logprobs - expected).abs().mean() < 0.02


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_layout_names_the_linear_modules_of_transformers(
    family: str, tiny_model: TinyModel
) -> None:
    folder = tiny_model(family)
    modules = {}
    for path, module in oracle(folder).named_modules():
        if isinstance(module, torch.nn.Linear):
            modules[path] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            modules[path] = (module.nx, module.nf)
    layout = load(folder).layout
    targets = {
        target.path: (target.in_features, target.out_features) for target in layout.iter_targets()
    }
    assert targets == modules
    assert [target.index for target in layout.iter_targets()] == list(range(len(modules)))


class Places:
    """Stands for a step's adapters and notes where it is asked for corrections."""

    def __init__(self) -> None:
        self.sites: list[tuple[int, tuple[int, ...], int, int]] = []
        self.norms: list[int] = []
        self.embeddings: list[int] = []
        self.halves: list[tuple[int, int]] = []
        self.attentions: list[int] = []

    def linear(self, base: LinearOp, x: Tensor, targets: SiteTargets) -> Tensor:
        y = base(x)
        self.sites.append((targets.first, targets.out_starts, x.shape[1], y.shape[1]))
        return y

    def norm(self, y: Tensor, x: Tensor, row: int, eps: float, *, centered: bool) -> None:
        self.norms.append(row)

    def embedding(self, x: Tensor, ids: Tensor, row: int) -> None:
        self.embeddings.append(row)

    def half(self, h: Tensor, residual: Tensor, layer: int, half: int) -> None:
        self.halves.append((layer, half))

    def attention(self, out: Tensor, query: Tensor, layer: int, *sizes: Any) -> None:
        self.attentions.append(layer)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_every_place_is_offered_to_the_adapters_once(family: str, tiny_model: TinyModel) -> None:
    decoder, places = load(tiny_model(family)), Places()
    PagedRun(decoder, [[1, 2, 3]], block_size=4).step([(0, 0, 3)], places)
    layout = decoder.layout
    assert places.sites == [
        (site.targets[0].index, site.out_starts, site.in_features, site.out_features)
        for site in layout.sites
    ]
    assert sorted(places.norms) == list(range(len(layout.norms)))
    assert places.embeddings == list(range(len(layout.embeddings)))
    assert places.halves == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert places.attentions == [0, 1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_the_base_that_adapters_see_is_the_one_of_transformers(
    family: str, tiny_model: TinyModel
) -> None:
    folder = tiny_model(family)
    base, modules = load_base(folder, torch.float32), dict(oracle(folder).named_modules())
    layout = base.layout
    for target in layout.iter_targets():
        weight, bias = base.linear(target)
        module = modules[target.path]
        assert target.is_transposed == isinstance(module, Conv1D)
        assert torch.equal(weight, module.weight.t() if target.is_transposed else module.weight)
        assert (bias is None) == (module.bias is None) == (not target.has_bias)
        assert bias is None or torch.equal(bias, module.bias)
    norms = {path for path in modules if "norm" in path.rpartition(".")[2] or ".ln_" in path}
    assert set(layout.norms_by_path) == norms
    for norm in layout.norms:
        weight, bias = base.norm(norm)
        assert torch.equal(weight, modules[norm.path].weight)
        assert norm.has_bias == (bias is not None)
        assert bias is None or torch.equal(bias, modules[norm.path].bias)
    for site in layout.embeddings:
        assert torch.equal(base.embedding(site), modules[site.path].weight)
    for layer in layout.layers:
        assert {layer.path, layer.attention_path} <= set(modules)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
def test_encoded_rows_leave_the_keys_and_values_of_transformers(
    family: str, tiny_model: TinyModel
) -> None:
    folder = tiny_model(family)
    model, base = oracle(folder), load_base(folder, torch.float32)
    embeddings = torch.randn(19, 64, generator=torch.Generator().manual_seed(0))
    before = embeddings.clone()
    keys, values = base.encode(embeddings)
    assert torch.equal(embeddings, before)
    with torch.inference_mode():
        cache = model(inputs_embeds=embeddings[None], use_cache=True).past_key_values
    for layer in range(2):
        wanted = cache.layers[layer]
        window = wanted.keys.shape[2]  # a sliding cache keeps the last ones alone
        torch.testing.assert_close(keys[layer][:, -window:], wanted.keys[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            values[layer][:, -window:], wanted.values[0], atol=1e-5, rtol=1e-5
        )


def test_names_without_the_decoder_prefix_and_saved_buffers_are_read(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """As the first GPT-2 checkpoints were saved."""
    folder = tiny_model("gpt2")
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tokens = [5, 6, 7]
    ours, bare = (
        PagedRun(load(path), [tokens], block_size=4).step([(0, 0, 3)])[0]
        for path in (folder, tmp_path)
    )
    assert torch.equal(ours, bare)


def test_kv_bytes_per_token_is_what_the_cache_takes(tiny_model: TinyModel) -> None:
    decoder = load(tiny_model("qwen3"), torch.bfloat16)
    cache = decoder.new_kv_cache(num_blocks=3, block_size=8)
    assert decoder.kv_bytes_per_token * 24 == sum(
        tensor.nbytes for tensor in (*cache.keys, *cache.values)
    )


def test_a_tied_head_shares_the_embedding(tiny_model: TinyModel) -> None:
    decoder = load(tiny_model("qwen2"))
    decoder.tokens.weight.zero_()
    assert not decoder.logits(torch.ones(3, 64), None).any()


def test_the_loaded_model_does_not_depend_on_its_files(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    decoder = load(folder)
    before = decoder.logits(torch.ones(3, 64), None)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(b"\0" * weights.stat().st_size)
    assert torch.equal(decoder.logits(torch.ones(3, 64), None), before)
