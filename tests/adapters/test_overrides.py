"""Replaced and added tensors, against transformers' own modules with the changed parameters."""

import re
from collections.abc import Callable

import pytest
import torch

from deltamux.adapters.errors import AdapterMismatch, AdapterUnsupported
from deltamux.adapters.formats.overrides import (
    Mode,
    head_row_primitives,
    merge,
    override_primitives,
    override_shapes,
    tensor_shape,
    token_row_primitives,
)
from deltamux.adapters.primitives.embedding import EmbeddingRows
from deltamux.adapters.primitives.layer import NormOverride
from deltamux.adapters.primitives.linear import Affine, Dense, OutputRows
from deltamux.adapters.primitives.lowered import LoweredAdapter, Part
from deltamux.adapters.primitives.primitive import Primitive
from deltamux.adapters.scope import EveryPosition
from deltamux.server.model.base import load_base

from .changed_model import changed, drawn
from .peft_oracle import TinyBase, our_outputs, peft_outputs

Tiny = Callable[[str], TinyBase]

EVERYTHING = {
    "llama": (
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.bias",
        "model.layers.1.post_attention_layernorm.bias",
        "model.norm.weight",
        "model.norm.bias",
        "lm_head.weight",
    ),
    "qwen3": (
        "model.layers.0.self_attn.k_norm.weight",
        "model.layers.1.self_attn.q_norm.bias",
        "model.layers.1.self_attn.o_proj.weight",
        "lm_head.weight",
    ),
    "qwen2": (
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.bias",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.embed_tokens.weight",
    ),
    "gpt2": (
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.h.0.ln_1.weight",
        "transformer.h.0.ln_2.bias",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_attn.bias",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.1.attn.c_proj.bias",
        "transformer.h.1.mlp.c_fc.weight",
        "transformer.h.1.mlp.c_proj.bias",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "lm_head.bias",
    ),
}


def adapter_of(primitives: tuple[Primitive, ...]) -> LoweredAdapter:
    return LoweredAdapter("digest", "kind", "library", (Part(EveryPosition(), primitives),))


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("family", EVERYTHING)
def test_every_place_computes_what_the_changed_model_does(tiny: Tiny, family: str, mode: Mode):
    base = tiny(family)
    tensors = drawn(base, EVERYTHING[family])
    adapter = adapter_of(override_primitives(base.base, tensors, mode))
    actual = our_outputs(base, adapter)
    for path, expected in peft_outputs(base, changed(base, tensors, mode)).items():
        torch.testing.assert_close(actual[path], expected, atol=2e-5, rtol=0, msg=path)
    assert {each.path for each in adapter.primitives} == {
        name.rpartition(".")[0] for name in tensors
    }


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_tied_head_and_its_embedding_change_alone(tiny: Tiny, family: str):
    layout = tiny(family).base.layout
    for path in (layout.head_path, layout.token_embedding.path):
        tensors = drawn(tiny(family), (f"{path}.weight",))
        assert {each.path for each in override_primitives(tiny(family).base, tensors)} == {path}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_equals_the_base_costs_nothing(tiny: Tiny, family: str, dtype: torch.dtype):
    base = load_base(tiny(family).folder, dtype)
    same = {
        name: tensor.clone()
        for name, tensor in tiny(family).model.state_dict().items()
        if not name.endswith("lm_head.weight")
    }
    assert override_primitives(base, same) == ()
    nothing = {name: torch.zeros_like(tensor) for name, tensor in same.items()}
    assert override_primitives(base, nothing, "add") == ()


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_only_changed_rows_of_an_embedding_are_stored(tiny: Tiny, mode: Mode):
    base = tiny("llama").base
    rows = base.embedding(base.layout.token_embedding).clone()
    if mode == "add":
        rows.zero_()
    rows[[290, 3]] += 1
    (found,) = override_primitives(base, {"model.embed_tokens.weight": rows}, mode)
    assert isinstance(found, EmbeddingRows)
    assert found.ids is not None
    assert found.ids.dtype is torch.int32
    assert found.ids.tolist() == [3, 290]
    assert found.rows.shape == (2, 64)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.7.mlp.up_proj.weight", (96, 64), "model.layers.7.mlp.up_proj.weight"),
        ("model.layers.0.mlp.up_proj.scale", (96,), "model.layers.0.mlp.up_proj.scale"),
        ("model.layers.0.mlp.weight", (96, 64), "is not a weight or bias of it"),
        ("weight", (96, 64), "'weight' is not a weight or bias of it"),
        ("model.embed_tokens.bias", (64,), "model.embed_tokens.bias"),
        ("model.layers.0.mlp.up_proj.weight", (64, 96), r"\[64, 96\] there, \[96, 64\] here"),
        ("model.layers.0.mlp.up_proj.weight", (96, 64, 1), r"\[96, 64, 1\] there"),
        ("model.layers.0.mlp.up_proj.bias", (1,), r"\[1\] there, \[96\] here"),
        ("model.norm.weight", (), r"\[\] there, \[64\] here"),
        ("model.norm.bias", (65,), r"\[65\] there, \[64\] here"),
        ("model.embed_tokens.weight", (301, 64), "a vocabulary of another size"),
        ("lm_head.weight", (301, 64), "a vocabulary of another size"),
        ("lm_head.weight", (300, 65), r"\[300, 65\] there, \[300, 64\] here\. This"),
    ],
)
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_a_tensor_of_another_base_is_named(
    tiny: Tiny, name: str, shape: tuple[int, ...], message: str, mode: Mode
):
    with pytest.raises(AdapterMismatch, match=message):
        override_primitives(tiny("llama").base, {name: torch.randn(shape)}, mode)


def test_conv1d_weights_have_the_shape_they_are_stored_in(tiny: Tiny):
    layout = tiny("gpt2").base.layout
    assert tensor_shape(layout, "transformer.h.0.mlp.c_fc.weight") == (64, 256)
    assert tensor_shape(layout, "lm_head.weight") == (300, 64)
    with pytest.raises(AdapterMismatch, match=r"c_fc.weight is \[256, 64\] there, \[64, 256\]"):
        override_primitives(
            tiny("gpt2").base, {"transformer.h.0.mlp.c_fc.weight": torch.randn(256, 64)}
        )


def test_tensors_that_hold_no_numbers_are_refused(tiny: Tiny):
    tensors = {"model.norm.weight": torch.ones(64, dtype=torch.int64)}
    with pytest.raises(AdapterUnsupported, match=re.escape("model.norm.weight")):
        override_primitives(tiny("llama").base, tensors)


def test_what_overflows_in_the_base_s_dtype_is_refused(tiny: Tiny):
    base = load_base(tiny("llama").folder, torch.float16)
    with pytest.raises(AdapterUnsupported, match=r"overflows in torch\.float16"):
        override_primitives(base, {"model.norm.weight": torch.full((64,), 1e6)})


def test_shapes_tell_primitives_without_a_base():
    shapes = override_shapes(
        {
            "a.weight": torch.ones(3, 4),
            "a.bias": torch.ones(3),
            "n.weight": torch.ones(5),
            "n.bias": torch.ones(5),
            "b.bias": torch.ones(2),
            "model.embed_tokens.weight": torch.ones(7, 2),
        }
    )
    assert [(each.path, each.primitive, each.num_elements) for each in shapes] == [
        ("a", "Affine", 3),
        ("a", "Dense", 12),
        ("b", "Affine", 2),
        ("model.embed_tokens", "EmbeddingRows", 14),
        ("n", "NormOverride", 5),
        ("n", "NormOverride", 5),
    ]


def test_token_rows_are_shared_by_embedding_and_head(tiny: Tiny):
    base = tiny("qwen2").base
    rows = {250: torch.randn(64), 7: torch.randn(64)}
    site = base.layout.token_embedding
    embedded, head = token_row_primitives(base, rows, site, head=True)
    assert isinstance(embedded, EmbeddingRows)
    assert isinstance(head, OutputRows)
    assert head.weight is embedded.rows
    assert head.indices is embedded.ids
    assert head.indices.tolist() == [7, 250]
    torch.testing.assert_close(head.weight, torch.stack([rows[7], rows[250]]))
    assert len(adapter_of((embedded, head)).tensors) == 2
    assert len(token_row_primitives(base, rows, site, head=False)) == 1
    assert token_row_primitives(base, {}, site, head=True) == head_row_primitives(base, {}) == ()
    (alone,) = head_row_primitives(base, rows)
    assert isinstance(alone, OutputRows)
    torch.testing.assert_close(alone.weight, head.weight)


@pytest.mark.parametrize("token", [-1, 300, 1 << 70])
def test_tokens_beyond_the_vocabulary_are_refused(tiny: Tiny, token: int):
    base = tiny("llama").base
    with pytest.raises(AdapterMismatch, match="300 rows, none for token"):
        token_row_primitives(base, {token: torch.randn(64)}, base.layout.token_embedding, False)
    with pytest.raises(AdapterMismatch, match="300 rows, none for token"):
        head_row_primitives(base, {token: torch.randn(64)})


def test_rows_of_another_width_are_refused(tiny: Tiny):
    base = tiny("llama").base
    with pytest.raises(AdapterMismatch, match=r"\[63\] there, \[64\] here"):
        token_row_primitives(base, {1: torch.randn(63)}, base.layout.token_embedding, False)


class TestMerge:
    """Affine corrections of one target add up, each a correction of what the base computed."""

    def test_low_rank_bias_and_scale_are_one(self, tiny: Tiny):
        base = tiny("llama").base
        target = base.layout.targets["model.layers.0.self_attn.q_proj"]
        a, b = torch.randn(3, 64), torch.randn(3, 64)
        parts = (
            Affine(target, bias=torch.randn(64)),
            Affine(target, a=a, b=b, bias=torch.randn(64)),
            Affine(target, scale=torch.randn(64)),
        )
        (joined,) = merge(parts)
        assert isinstance(joined, Affine)
        assert joined.a is a
        assert joined.b is b
        torch.testing.assert_close(joined.bias, parts[0].bias + parts[1].bias)
        assert joined.scale is parts[2].scale
        assert merge(reversed(parts))[0].scale is parts[2].scale

    def test_places_are_in_order(self, tiny: Tiny):
        layout = tiny("llama").base.layout
        targets = list(layout.iter_targets())
        norms = [NormOverride(site, torch.ones(64)) for site in layout.norms]
        affine = [Affine(target, bias=torch.ones(target.out_features)) for target in targets]
        dense = [Dense(target, torch.ones(1, 1)) for target in targets]
        mixed = [x for each in zip(norms, affine, dense, strict=False) for x in each][::-1]
        count = len(norms)
        assert merge(mixed) == (*affine[:count], *dense[:count], *norms)

    @pytest.mark.parametrize("what", ["low-rank part", "scale of its output", "Dense"])
    def test_what_cannot_be_one_is_refused(self, tiny: Tiny, what: str):
        target = tiny("llama").base.layout.targets["model.layers.0.self_attn.q_proj"]
        one = {
            "low-rank part": Affine(target, a=torch.ones(1, 64), b=torch.ones(1, 64)),
            "scale of its output": Affine(target, scale=torch.ones(64)),
            "Dense": Dense(target, torch.ones(64, 64)),
        }[what]
        with pytest.raises(AdapterUnsupported, match=rf"q_proj' is changed twice \({what}\)"):
            merge((one, one))


def test_replacing_a_weight_and_only_then_its_bias_is_one_correction(tiny: Tiny):
    """A replaced weight keeps the base's bias unless the file has one."""
    base = tiny("qwen2")
    name = "model.layers.0.self_attn.k_proj.weight"
    affine, dense = override_primitives(base.base, drawn(base, (name,)))
    assert isinstance(affine, Affine)
    assert isinstance(dense, Dense)
    assert affine.scale is not None
    assert not affine.scale.any()
    own = base.base.linear(affine.target).bias
    torch.testing.assert_close(affine.bias, own)
