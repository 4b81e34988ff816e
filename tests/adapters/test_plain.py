"""The plain format, against transformers' model with the same parameters changed."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deltamux.adapters.errors import AdapterCorrupt, AdapterMismatch, AdapterUnsupported
from deltamux.adapters.formats.fastfood import Fastfood, padded_length, walsh_hadamard
from deltamux.adapters.formats.overrides import Mode, tensor_shape
from deltamux.adapters.primitives.embedding import EmbeddingRows
from deltamux.adapters.primitives.layer import NormOverride
from deltamux.adapters.primitives.linear import Affine, Dense

from .changed_model import changed, drawn
from .peft_oracle import TinyBase
from .whole_model import prompt_logprobs

Tiny = Callable[[str], TinyBase]

PROMPT = [5, 120, 77, 210, 9, 64, 33, 181, 12, 250, 3]
TOLERANCE = 1e-4

BIASES = {
    "llama": ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm"),
    "qwen2": ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "post_attention_layernorm"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "ln_2"),
}
LAST_LAYER = {
    "llama": (
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ),
    "gpt2": (
        "transformer.h.1.attn.c_attn.weight",
        "transformer.h.1.attn.c_attn.bias",
        "transformer.h.1.attn.c_proj.weight",
        "transformer.h.1.mlp.c_proj.weight",
        "transformer.h.1.ln_1.bias",
        "transformer.ln_f.weight",
    ),
}
ANY = {
    "llama": ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"),
    "qwen2": ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"),
    "qwen3": ("model.layers.0.self_attn.q_norm.weight", "model.layers.1.self_attn.o_proj.weight"),
    "gpt2": ("transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.bias"),
}


def write(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    """A delta: its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "delta_config.json").write_text(json.dumps(config), encoding="utf-8")
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "delta.safetensors")
    return folder


def biases(family: str, base: TinyBase) -> tuple[str, ...]:
    paths = [f"{layer.path}.{name}" for layer in base.base.layout.layers for name in BIASES[family]]
    return (*(f"{path}.bias" for path in paths), f"{base.base.layout.norms[-1].path}.bias")


@torch.inference_mode()
def assert_is(base: TinyBase, folder: Path, tensors: Mapping[str, Tensor], mode: Mode) -> None:
    """Log-probabilities are those of the changed model, and not the base's."""
    ids = torch.tensor([PROMPT])
    rows = [
        model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        for model in (base.model, changed(base, tensors, mode))
    ]
    assert (rows[0] - rows[1]).abs().max() > 0.05
    actual = prompt_logprobs(base.base, base.lower(folder), PROMPT)
    torch.testing.assert_close(actual, rows[1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("family", BIASES)
def test_bitfit(tiny: Tiny, tmp_path: Path, family: str, mode: Mode):
    base = tiny(family)
    tensors = drawn(base, biases(family, base))
    folder = write(tmp_path, {"delta_type": "bitfit", "mode": mode, "base_model": "any"}, tensors)
    assert_is(base, folder, tensors, mode)
    assert {type(each) for each in base.lower(folder).primitives} == {Affine, NormOverride}


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("family", LAST_LAYER)
def test_freeze(tiny: Tiny, tmp_path: Path, family: str, mode: Mode):
    base = tiny(family)
    tensors = drawn(base, LAST_LAYER[family])
    folder = write(tmp_path, {"delta_type": "freeze", "mode": mode}, tensors)
    assert_is(base, folder, tensors, mode)


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("family", ANY)
def test_tensors(tiny: Tiny, tmp_path: Path, family: str, mode: Mode):
    base = tiny(family)
    tensors = drawn(base, ANY[family])
    folder = write(tmp_path, {"delta_type": "tensors", "mode": mode}, tensors)
    assert_is(base, folder, tensors, mode)


def test_names_may_carry_what_peft_puts_into_them(tiny: Tiny, tmp_path: Path):
    base = tiny("llama")
    tensors = drawn(base, ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"))
    named = {
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight": tensors[
            "model.layers.0.mlp.up_proj.weight"
        ],
        "base_model.model.model.norm.weight": tensors["model.norm.weight"],
    }
    folder = write(tmp_path, {"delta_type": "tensors", "mode": "replace"}, named)
    assert_is(base, folder, tensors, "replace")


NORM = {"model.norm.weight": torch.ones(64)}
NORM_BIAS = {"model.norm.bias": torch.ones(64)}
SECOND = {"model.layers.1.mlp.up_proj.weight": torch.ones(96, 64)}
FIRST = {"model.layers.0.mlp.up_proj.weight": torch.ones(96, 64)}
EMBEDDING = {"model.embed_tokens.weight": torch.ones(300, 64)}


@pytest.mark.parametrize(
    ("config", "tensors", "error", "message"),
    [
        ({"delta_type": "adapter", "mode": "add"}, NORM, AdapterUnsupported, "'adapter' is not"),
        ({"mode": "add"}, NORM, AdapterUnsupported, "delta_type None is not served"),
        ({"delta_type": ["tensors"], "mode": "add"}, NORM, AdapterUnsupported, "is not served"),
        ({"delta_type": "tensors"}, NORM, AdapterCorrupt, "'mode' is None"),
        ({"delta_type": "tensors", "mode": True}, NORM, AdapterCorrupt, "'mode' is True"),
        ({"delta_type": "tensors", "mode": "ADD"}, NORM, AdapterCorrupt, "'mode' is 'ADD'"),
        (
            {"delta_type": "tensors", "mode": "add", "scale": 2},
            NORM,
            AdapterUnsupported,
            "'scale' is not known",
        ),
        (
            {"delta_type": "tensors", "mode": "add", "seed": 1},
            NORM,
            AdapterUnsupported,
            "'seed' is not known",
        ),
        ({"delta_type": "tensors", "mode": "add"}, {}, AdapterCorrupt, "no tensor at all"),
        (
            {"delta_type": "tensors", "mode": "add"},
            {**NORM, "base_model.model.model.norm.weight": torch.ones(64)},
            AdapterCorrupt,
            "under two names",
        ),
        (
            {"delta_type": "tensors", "mode": "add"},
            {"model.norm.weight": torch.ones(63)},
            AdapterMismatch,
            r"model.norm.weight is \[63\]",
        ),
        (
            {"delta_type": "tensors", "mode": "add"},
            {"model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)},
            AdapterMismatch,
            "model.layers.2.mlp.up_proj.weight",
        ),
        (
            {"delta_type": "tensors", "mode": "add"},
            {"model.norm.weight": torch.ones(64, dtype=torch.int32)},
            AdapterUnsupported,
            "int32",
        ),
        ({"delta_type": "bitfit", "mode": "add"}, NORM, AdapterCorrupt, "norm.weight' is no bias"),
        ({"delta_type": "freeze", "mode": "add"}, FIRST, AdapterMismatch, "but not model.layers.1"),
        (
            {"delta_type": "freeze", "mode": "add"},
            {**SECOND, **EMBEDDING},
            AdapterMismatch,
            "before its last layers",
        ),
    ],
)
def test_refusals(
    tiny: Tiny,
    tmp_path: Path,
    config: dict[str, object],
    tensors: dict[str, Tensor],
    error: type[Exception],
    message: str,
):
    with pytest.raises(error, match=message):
        tiny("llama").lower(write(tmp_path, config, tensors))


@pytest.mark.parametrize("tensors", [NORM, NORM_BIAS, SECOND, {**FIRST, **SECOND}])
def test_any_number_of_last_layers_is_a_freeze(
    tiny: Tiny, tmp_path: Path, tensors: dict[str, Tensor]
):
    folder = write(tmp_path, {"delta_type": "freeze", "mode": "replace"}, tensors)
    assert {each.path for each in tiny("llama").lower(folder).primitives} == {
        name.rpartition(".")[0] for name in tensors
    }


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_one_of_two_names_of_one_weight_is_ambiguous(tiny: Tiny, tmp_path: Path, name: str):
    base, config = tiny("qwen2"), {"delta_type": "tensors", "mode": "add"}
    delta = drawn(base, (name,))
    with pytest.raises(AdapterUnsupported, match="one weight in this base"):
        base.lower(write(tmp_path, config, delta))
    both = {
        "model.embed_tokens.weight": torch.zeros(300, 64),
        "lm_head.weight": torch.zeros(300, 64),
    }
    (found,) = base.lower(write(tmp_path, config, {**both, **delta})).primitives
    assert f"{found.path}.weight" == name


# Fastfood, as its authors write it: every matrix there


def hadamard(size: int) -> Tensor:
    """H (size, size) by Sylvester's construction, in float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def explicit(theta: Tensor, count: int, b: Tensor, pi: Tensor, g: Tensor) -> Tensor:
    """[H G Π H B pad(θ)]_{:D} / (sqrt(L ΣG²) sqrt(D / L)), by matrices."""
    size = len(b)
    h, b, g = hadamard(size), b.double(), g.double()
    padded = torch.zeros(size, dtype=torch.float64)
    padded[: len(theta)] = theta.double()[:size]
    permuted = torch.eye(size, dtype=torch.float64)[pi.long()]
    whole = h @ torch.diag(g) @ permuted @ h @ torch.diag(b) @ padded
    return whole[:count] / (math.sqrt(size * float((g**2).sum())) * math.sqrt(count / size))


def draws(counts: Iterable[int], seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """B, Π and G of tensors with these numbers, as the page says."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for count in counts:
        size = 1 << math.ceil(math.log2(count))
        signs = 2 * torch.randint(0, 2, (size,), dtype=torch.int8, generator=g) - 1
        permutation = torch.randperm(size, dtype=torch.int32, generator=g)
        found.append((signs, permutation, torch.randn(size, generator=g)))
    return found


@pytest.mark.parametrize("size", [1, 2, 8, 64, 256])
def test_the_fast_transform_is_the_matrix(size: int):
    x = torch.randn(size)
    expected = hadamard(size) @ x.double()
    walsh_hadamard(x)
    torch.testing.assert_close(x.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 100, 513, 1000])
@pytest.mark.parametrize("size", [1, 7, 300])
def test_the_projection_is_its_matrices(count: int, size: int):
    theta, ((b, pi, g),) = torch.randn(size), draws([count], seed=4)
    assert padded_length(count) == len(b)
    expected = explicit(theta, count, b, pi, g).float()
    actual = Fastfood(b, pi, g).project(theta, count)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


SAID_NAMES = [
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.1.mlp.c_proj.bias",
    "transformer.h.0.ln_1.weight",
    "transformer.h.0.ln_1.bias",
    "transformer.h.1.mlp.c_fc.weight",
]
SAID = {"delta_type": "said", "projection": "fastfood", "tensors": SAID_NAMES}
SEED = 11


@pytest.fixture(scope="module")
def small(tiny_model: Callable[..., Path]) -> TinyBase:
    """So small that the matrices of a projection fit."""
    return TinyBase.load(tiny_model("gpt2", n_embd=16, n_head=2))


def said(names: list[str]) -> dict[str, Tensor]:
    """What is stored beside the projections."""
    generator = torch.Generator().manual_seed(2)
    theta = torch.randn(40, generator=generator)
    return {"theta_d": theta, "lambda": torch.randn(len(names), generator=generator) * 2}


def said_deltas(base: TinyBase, names: list[str]) -> dict[str, Tensor]:
    """What they are together."""
    stored = said(names)
    shapes = [tensor_shape(base.base.layout, name) for name in names]
    return {
        name: (scale * explicit(stored["theta_d"], math.prod(shape), *drawn)).view(shape).float()
        for name, shape, scale, drawn in zip(
            names, shapes, stored["lambda"], draws(map(math.prod, shapes), SEED), strict=True
        )
    }


def projections(base: TinyBase, names: list[str]) -> dict[str, Tensor]:
    counts = [math.prod(tensor_shape(base.base.layout, name)) for name in names]
    return {
        f"{name}.{part}": tensor
        for name, drawn in zip(names, draws(counts, SEED), strict=True)
        for part, tensor in zip(("B", "Pi", "G"), drawn, strict=True)
    }


def test_said_from_a_seed(small: TinyBase, tmp_path: Path):
    folder = write(tmp_path, {**SAID, "seed": SEED}, said(SAID_NAMES))
    assert_is(small, folder, said_deltas(small, SAID_NAMES), "add")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_said_with_stored_projections(small: TinyBase, tmp_path: Path, dtype: torch.dtype):
    beside = projections(small, SAID_NAMES)
    signs = {name: each.to(dtype) for name, each in beside.items() if name.endswith(".B")}
    folder = write(tmp_path, {**SAID, "mode": "add"}, {**said(SAID_NAMES), **beside, **signs})
    assert_is(small, folder, said_deltas(small, SAID_NAMES), "add")


def test_said_changes_a_weight_under_both_of_its_names(small: TinyBase, tmp_path: Path):
    stored = {"theta_d": torch.randn(5), "lambda": torch.ones(1)}
    config = {**SAID, "tensors": ["transformer.wte.weight"], "seed": 1}
    dense, rows = small.lower(write(tmp_path, config, stored)).primitives
    assert isinstance(dense, Dense)
    assert isinstance(rows, EmbeddingRows)
    own = small.base.embedding(rows.site)
    torch.testing.assert_close(rows.rows - own, dense.weight, atol=1e-6, rtol=0)
    with pytest.raises(AdapterUnsupported, match="name that one alone"):
        small.lower(write(tmp_path, {**config, "tensors": ["lm_head.weight"]}, stored))


def broken(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return apply


FIRST_NAME = SAID_NAMES[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (broken(f"{FIRST_NAME}.B", lambda t: t * 2), AdapterCorrupt, "B must be signs"),
        (broken(f"{FIRST_NAME}.B", lambda t: t > 0), AdapterUnsupported, "torch.bool"),
        (broken(f"{FIRST_NAME}.Pi", torch.zeros_like), AdapterCorrupt, "Pi a permutation"),
        (broken(f"{FIRST_NAME}.Pi", lambda t: t - 1), AdapterCorrupt, "Pi a permutation"),
        (broken(f"{FIRST_NAME}.Pi", lambda t: t.float()), AdapterUnsupported, "torch.float32"),
        (broken(f"{FIRST_NAME}.G", torch.zeros_like), AdapterCorrupt, "not zero"),
        (broken(f"{FIRST_NAME}.G", lambda t: t.double() * 1e-300), AdapterUnsupported, "overflows"),
        (broken(f"{FIRST_NAME}.G", lambda t: t[:-1]), AdapterCorrupt, r"G of \[1023\]"),
        (lambda t: t.pop(f"{FIRST_NAME}.G"), AdapterCorrupt, f"no tensor '{FIRST_NAME}.G'"),
        (lambda t: t.update(more=torch.ones(1)), AdapterUnsupported, "'more' is not one of"),
        (lambda t: t.pop("theta_d"), AdapterCorrupt, "no tensor 'theta_d'"),
        (broken("lambda", lambda t: t[:-1]), AdapterCorrupt, r"lambda of \[4\]"),
        (broken("theta_d", lambda t: t[None]), AdapterCorrupt, r"theta_d of \[1, 40\]"),
        (broken("theta_d", lambda t: t[:0]), AdapterCorrupt, r"theta_d of \[0\]"),
        (broken("theta_d", lambda t: t.double() * 1e300), AdapterCorrupt, "as float32"),
    ],
)
def test_said_refuses_what_is_no_projection(
    small: TinyBase,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], object],
    error: type[Exception],
    message: str,
):
    tensors = {**said(SAID_NAMES), **projections(small, SAID_NAMES)}
    change(tensors)
    with pytest.raises(error, match=message):
        small.lower(write(tmp_path, SAID, tensors))


def test_said_refuses_projections_of_another_size(small: TinyBase, tmp_path: Path):
    names = ["transformer.h.0.ln_1.bias"]
    stored = {
        "theta_d": torch.ones(3),
        "lambda": torch.ones(1),
        **{f"{names[0]}.{part}": torch.ones(32) for part in "BG"},
        f"{names[0]}.Pi": torch.arange(32),
    }
    with pytest.raises(AdapterMismatch, match=r"has 32 numbers, and \[16\] needs 16"):
        small.lower(write(tmp_path, {**SAID, "tensors": names}, stored))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, AdapterUnsupported, "neither stored nor given by a 'seed'"),
        ({"seed": -1}, AdapterCorrupt, "'seed' is -1"),
        ({"seed": 1 << 64}, AdapterCorrupt, "not a seed"),
        ({"seed": True}, AdapterCorrupt, "'seed' is True"),
        ({"seed": 1.5}, AdapterCorrupt, "'seed' is 1.5"),
        ({"seed": 1, "mode": "replace"}, AdapterUnsupported, "'mode': 'add'"),
        ({"seed": 1, "projection": "dense"}, AdapterUnsupported, "'projection': 'fastfood'"),
        ({"seed": 1, "projection": None}, AdapterUnsupported, "'projection': 'fastfood'"),
        ({"seed": 1, "tensors": None}, AdapterCorrupt, "'tensors' is None"),
        ({"seed": 1, "tensors": []}, AdapterCorrupt, "not a list of tensor names"),
        ({"seed": 1, "tensors": "all"}, AdapterCorrupt, "not a list of tensor names"),
        ({"seed": 1, "tensors": [1] * 5}, AdapterCorrupt, "not a list of tensor names"),
        ({"seed": 1, "tensors": [SAID_NAMES[0]] * 5}, AdapterCorrupt, "a name twice"),
        (
            {"seed": 1, "tensors": [*SAID_NAMES[:4], "transformer.h.9.ln_1.bias"]},
            AdapterMismatch,
            "transformer.h.9.ln_1.bias",
        ),
        ({"seed": 1, "rank": 4}, AdapterUnsupported, "'rank' is not known"),
    ],
)
def test_said_refusals(
    small: TinyBase,
    tmp_path: Path,
    fields: dict[str, object],
    error: type[Exception],
    message: str,
):
    with pytest.raises(error, match=message):
        small.lower(write(tmp_path, {**SAID, **fields}, said(SAID_NAMES)))
