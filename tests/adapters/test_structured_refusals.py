"""Structured kinds refuse, by name, what they cannot serve as PEFT computes it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from deltamux.adapters.base import Base
from deltamux.adapters.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterMismatch,
    AdapterUnsupported,
)
from deltamux.server.model.base import load_base

from .structured import CASES, Saved, same

KINDS = [
    "loha",
    "lokr, both factored",
    "lokr, whole",
    "vera",
    "vera, drawn",
    "vblora",
    "vblora, topk",
    "randlora",
    "randlora, drawn",
    "fourierft, pattern",
    "shira",
    "miss",
    "miss, mini",
    "miss, bat",
    "c3a, pattern",
    "hra",
    "hra, Gram-Schmidt",
    "oft",
    "oft, constrained, shared",
    "boft",
    "boft, 3 factors",
    "poly, task 1",
]
HOSTILE = (
    0,
    -1,
    3,
    10**30,
    -(10**30),
    1e308,
    float("inf"),
    True,
    "8",
    1.5,
    None,
    [],
    {"q": -1},
    [1],
)
CONV1D = ("vera", "vblora", "randlora", "fourierft")
"""Kinds that PEFT has for GPT-2's Conv1D."""
WIDTHLESS = ("miss, mini", "oft, constrained, shared", "fourierft", "randlora")
"""Whose tensors fit a module of (in, out) features and one of (out, in)."""
PREFIX = "base_model.model."


Load = Callable[[str], Saved]


@pytest.fixture(scope="module")
def load(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Load:
    """``Saved.of`` by the name of the case, each made once."""

    @cache
    def get(name: str) -> Saved:
        return Saved.of(name, tiny_model(CASES[name].family), tmp_path_factory.mktemp("adapter"))

    return get


@pytest.fixture(scope="session")
def gpt2(tiny_model: Callable[..., Path]) -> Base:
    return load_base(tiny_model("gpt2"), torch.float32)


@pytest.mark.parametrize("name", KINDS)
def test_an_unknown_field_is_refused_by_its_name(name: str, load: Load) -> None:
    with pytest.raises(AdapterUnsupported, match="'mystery' is not known"):
        load(name).lower(mystery=1)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_without_tensors_is_corrupt(name: str, load: Load) -> None:
    with pytest.raises(AdapterCorrupt, match=r"no tensor at all|is not in the file"):
        load(name).lower(tensors={})


@pytest.mark.parametrize("name", KINDS)
def test_every_tensor_of_a_module_is_needed(name: str, load: Load) -> None:
    saved = load(name)
    names = [each for each in saved.checkpoint.tensors if ".layers.0.self_attn.q_proj." in each]
    names += [each for each in saved.checkpoint.tensors if not each.startswith(PREFIX)]
    for missing in names if len(names) > 1 else []:
        if missing.startswith(PREFIX) and missing.endswith(("randlora_A", "randlora_B")):
            continue  # a copy
        rest = {n: tensor for n, tensor in saved.checkpoint.tensors.items() if n != missing}
        with pytest.raises(AdapterCorrupt):
            saved.lower(tensors=rest)


@pytest.mark.parametrize("name", KINDS)
def test_a_tensor_of_another_shape_is_refused(name: str, load: Load) -> None:
    saved = load(name)
    for path in [each for each in saved.checkpoint.tensors if "layers.1" not in each]:
        tensor = saved.checkpoint.tensors[path]
        others = [torch.cat([tensor, tensor[:1]]), tensor[:0], tensor[None], tensor.reshape(-1)[0]]
        if tensor.dim() > 1:
            others.append(torch.cat([tensor, tensor[..., :1]], dim=-1))
        for other in others:
            with pytest.raises((AdapterCorrupt, AdapterMismatch)):
                saved.lower(tensors=saved.with_tensor(path, other))


@pytest.mark.parametrize("name", KINDS)
def test_tensors_that_are_no_floats_are_refused(name: str, load: Load) -> None:
    saved = load(name)
    for path, tensor in saved.checkpoint.tensors.items():
        if tensor.is_floating_point() and "layers.1" not in path:
            with pytest.raises((AdapterUnsupported, AdapterCorrupt)):
                saved.lower(tensors=saved.with_tensor(path, tensor.int()))


@pytest.mark.parametrize("name", KINDS)
def test_a_module_that_the_base_lacks_is_a_mismatch(name: str, load: Load) -> None:
    saved = load(name)
    with pytest.raises(AdapterMismatch, match=r"layers\.7\..* is not a linear module"):
        saved.lower(tensors=saved.renamed("layers.1.", "layers.7."))


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith(WIDTHLESS)])
def test_a_module_of_other_widths_is_a_mismatch(name: str, load: Load) -> None:
    saved = load(name)
    swapped = {
        each.replace("up_proj", "x").replace("down_proj", "up_proj").replace("x", "down_proj"): t
        for each, t in saved.checkpoint.tensors.items()
    }
    with pytest.raises(AdapterMismatch):
        saved.lower(tensors=swapped)


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith(CONV1D)])
def test_a_conv1d_is_refused_where_peft_has_no_such_adapter(
    name: str, load: Load, gpt2: Base
) -> None:
    saved = load(name)
    ours = {
        path.replace(
            "model.model.layers.0.self_attn.q_proj", "model.transformer.h.0.attn.c_proj"
        ): t
        for path, t in saved.checkpoint.tensors.items()
        if ".layers." not in path or ".layers.0.self_attn.q_proj" in path
    }
    with pytest.raises(AdapterUnsupported, match="Conv1D"):
        saved.lower(tensors=ours, base=gpt2)


@pytest.mark.parametrize("name", KINDS)
def test_hostile_fields_are_refused_or_mean_nothing(name: str, load: Load) -> None:
    """Every value gives an AdapterError, or exactly what the field's own value gives."""
    saved = load(name)
    expected = saved.lower()
    for field_name in saved.checkpoint.config:
        for value in HOSTILE:
            try:
                given = saved.lower(**{field_name: value})
            except AdapterError:
                continue
            if field_name not in COMPUTING:
                assert same(given, expected), (field_name, value)


COMPUTING = frozenset(
    {
        "r",
        "alpha",
        "alpha_pattern",
        "rank_pattern",
        "projection_prng_key",
        "randlora_alpha",
        "sparse",
        "very_sparse",
        "random_loc_seed",
        "scaling",
        "init_weights",
        "apply_GS",
        "coft",
        "eps",
        "block_share",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
        "mini_r",
        "topk",
    }
)
"""Fields that change the answer where their value is one that PEFT takes."""


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        ("loha", {"r": 4}, AdapterCorrupt, "hada_w1_a of"),
        ("loha", {"r": 5000}, AdapterUnsupported, "more than 4096"),
        ("loha", {"rank_pattern": {"q_proj": 5000}}, AdapterUnsupported, "more than 4096"),
        ("loha", {"alpha": "8"}, AdapterCorrupt, "'alpha'"),
        ("loha", {"alpha_pattern": {"q_proj": 1e10}}, AdapterCorrupt, "alpha_pattern"),
        ("lokr, both factored", {"r": 3}, AdapterCorrupt, "lokr_w1_a"),
        ("vera", {"save_projection": False}, AdapterCorrupt, "vera_A or vera_B is in the file"),
        ("vera, drawn", {"save_projection": True}, AdapterCorrupt, "is not in the file"),
        ("vera, drawn", {"projection_prng_key": 1 << 64}, AdapterCorrupt, "not a seed"),
        ("vera, drawn", {"projection_prng_key": True}, AdapterCorrupt, "not a seed"),
        ("vera", {"bias": "some"}, AdapterUnsupported, "'bias' has the unknown value"),
        ("vblora", {"topk": 21}, AdapterCorrupt, "topk is 21"),
        ("vblora", {"save_only_topk_weights": True}, AdapterUnsupported, "weights is true"),
        ("vblora, topk", {"save_only_topk_weights": False}, AdapterUnsupported, "weights is false"),
        ("vblora, topk", {"topk": 3}, AdapterCorrupt, "topk_indices"),
        ("randlora", {"save_projection": False}, AdapterCorrupt, "is in the file"),
        ("randlora, drawn", {"save_projection": True}, AdapterCorrupt, "is not in the file"),
        ("randlora", {"r": 7}, AdapterCorrupt, "randlora_lambda"),
        ("fourierft, pattern", {"n_frequency": 41}, AdapterCorrupt, "n_frequency"),
        ("fourierft, pattern", {"random_loc_seed": None}, AdapterCorrupt, "not a seed"),
        ("fourierft, pattern", {"n_frequency_pattern": [7]}, AdapterCorrupt, "not an object"),
        ("c3a, pattern", {"block_size_pattern": {"q_proj": 0}}, AdapterCorrupt, "not a count"),
        ("shira", {"r": 3}, AdapterMismatch, "entries of rank 3"),
        ("miss", {"init_weights": "bat"}, AdapterCorrupt, "miss_block"),
        ("miss", {"init_weights": "dim"}, AdapterUnsupported, "'dim'"),
        ("miss, mini", {"mini_r": 5}, AdapterCorrupt, "miss_block"),
        ("oft", {"oft_block_size": 8}, AdapterMismatch, "blocks of 8"),
        ("oft", {"r": 4}, AdapterCorrupt, "one has to be 0"),
        ("oft", {"num_cayley_neumann_terms": 17}, AdapterUnsupported, "more than 16"),
        ("oft", {"peft_version": "0.17.1"}, AdapterUnsupported, "before 0.18"),
        ("oft", {"peft_version": None}, AdapterUnsupported, "before 0.18"),
        ("oft", {"peft_version": "unknown"}, AdapterUnsupported, "before 0.18"),
        ("oft", {"block_share": True}, AdapterCorrupt, "oft_R.weight"),
        ("oft, constrained, shared", {"eps": -1.0}, AdapterCorrupt, "less than 0"),
        ("boft", {"boft_block_size": 4}, AdapterCorrupt, "boft_R"),
        ("boft", {"boft_block_num": 8}, AdapterCorrupt, "one has to be 0"),
        ("boft, 3 factors", {"boft_n_butterfly_factor": 2}, AdapterCorrupt, "factor is 2"),
        ("poly, task 1", {"poly_type": "mhr"}, AdapterUnsupported, "'mhr'"),
        ("poly, task 1", {"n_tasks": 2}, AdapterCorrupt, "module_logits"),
    ],
)
def test_fields_that_contradict_the_tensors_or_are_not_served(
    name: str, fields: dict[str, object], error: type[AdapterError], message: str, load: Load
) -> None:
    with pytest.raises(error, match=message):
        load(name).lower(**fields)


@pytest.mark.parametrize("task", [3, -1, 10**30, True, "1", 1.0, None])
def test_a_task_that_is_none_is_refused(task: object, load: Load) -> None:
    with pytest.raises(AdapterUnsupported, match="tasks are 0 to 2"):
        load("poly, task 1").lower(options={"task_id": task})


def test_a_task_must_be_named_where_there_are_several(load: Load) -> None:
    with pytest.raises(AdapterUnsupported, match=r'holds 3 tasks.*"task_id": 0.*deltamux\.json'):
        load("poly, task 1").lower(options={})
    assert set(load("poly, task 1").kind.page.options) == {"task_id"}


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("loha", "q_proj.hada_t1", "convolution"),
        ("lokr, whole", "q_proj.lokr_t2", "convolution"),
        ("oft", "q_proj.oft_r.default", "0.15.2"),
        ("vera", "q_proj.base_layer.bias", "'bias' is 'none'"),
        ("hra", "embed_tokens.token_adapter.trainable_tokens_delta", "rows of the embedding"),
        ("boft", "norm.weight", "modules_to_save does not name"),
        ("miss", "q_proj.lora_A.weight", "modules_to_save does not name"),
        ("c3a, pattern", "q_proj.something", "not one that PEFT gives"),
    ],
)
def test_other_tensors_are_refused_with_the_reason(
    name: str, tensor: str, message: str, load: Load
) -> None:
    saved = load(name)
    path = f"{PREFIX}model.layers.0.self_attn.{tensor}"
    with pytest.raises(AdapterUnsupported, match=message):
        saved.lower(tensors=saved.with_tensor(path, torch.randn(64)))


def test_old_oft_without_its_block_size_is_refused(load: Load) -> None:
    saved = load("oft")
    config = {k: v for k, v in saved.checkpoint.config.items() if k != "oft_block_size"}
    with pytest.raises(AdapterUnsupported, match=r"PEFT up to 0\.13"):
        saved.kind.parse(replace(saved.checkpoint, config=config))


def test_a_tensor_of_no_module_is_a_mismatch(load: Load) -> None:
    saved = load("loha")
    tensors = saved.with_tensor(
        f"{PREFIX}model.layers.0.self_attn.lora_A.weight", torch.randn(4, 4)
    )
    with pytest.raises(AdapterMismatch, match="lora_A"):
        saved.lower(tensors=tensors, modules_to_save=["self_attn"])


@pytest.mark.parametrize("name", ["loha", "loha, too wide", "hra", "miss, bat", "oft", "boft"])
def test_an_adapted_module_with_another_base_weight_is_refused(name: str, load: Load) -> None:
    saved = load(name)
    path = f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.weight"
    own = saved.base.linear(saved.base.layout.targets["model.layers.0.self_attn.q_proj"]).weight
    assert same(saved.lower(tensors=saved.with_tensor(path, own.clone())), saved.lower())
    with pytest.raises(AdapterUnsupported, match="is not the base's"):
        saved.lower(tensors=saved.with_tensor(path, own + 0.1))
