"""AdapterHub adapters that are not served say why; files that lie do nothing worse than that."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from deltamux.adapters.checkpoint import Checkpoint
from deltamux.adapters.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterMismatch,
    AdapterUnsupported,
)
from deltamux.adapters.lower import lower
from deltamux.server.model.base import ServedBase, load_base

from .adapterhub_folders import (
    ADAPTER,
    GOLDEN,
    checkpoint_of,
    folder,
    lower_checkpoint,
    with_fields,
    with_tensors,
)

REFUSED = GOLDEN / "adapterhub_refused"
KINDS = {
    "bottleneck": "llama/seq_bn",
    "bottleneck_scaled": "llama/scaled_par_bn",
    "bottleneck_per_layer": "llama/seq_bn_per_layer",
    "compacter": "llama/compacter",
    "lora": "llama/lora",
    "lora_fused": "gpt2/lora",
    "dora": "llama/dora",
    "vera": "llama/vera",
    "ia3": "llama/ia3",
    "prefix": "llama/prefix_mlp",
    "prefix_flat": "llama/prefix_flat",
    "reft": "llama/noreft",
    "loreft": "llama/loreft_rank_4",
    "union": "llama/union_lora_seq_bn",
}
HOSTILE: list[Any] = [
    -1,
    0,
    0.0,
    -0.5,
    1e300,
    10**30,
    1e-320,
    True,
    "8",
    "all",
    [],
    [0],
    [1e9],
    [-1],
    {},
    {"0": 0},
    {"default": "x"},
    None,
]


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Any]) -> Callable[[str], ServedBase]:
    loaded: dict[str, ServedBase] = {}

    def load(family: str) -> ServedBase:
        if family not in loaded:
            loaded[family] = load_base(tiny_model(family), torch.float32)
        return loaded[family]

    return load


@pytest.fixture
def serve(base: Callable[[str], ServedBase]) -> Callable[[str, Checkpoint], object]:
    """Parse and lower a changed checkpoint on the family of the folder it came from."""

    def run(name: str, checkpoint: Checkpoint) -> object:
        return lower_checkpoint(checkpoint, folder(name), base(name.split("/")[0]))

    return run


Serve = Callable[[str, Checkpoint], object]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unipelt", "'use_gating' is not served"),
        ("gated_seq_bn", "'use_gating' is not served"),
        ("gated_lora", "'use_gating' is not served"),
        ("gated_ia3", "'use_gating' is not served"),
        ("gated_prefix", "'use_gating' is not served"),
        ("gated_union", "'use_gating' is not served"),
        ("invertible_glow", "'inv_adapter' is 'glow'"),
        ("invertible_nice_interface", "'inv_adapter' is not served for 'qwen2'"),
        ("post_add_residual", "'residual_before_ln' is 'post_add'"),
        ("prompt_tuning", "'prompt_tuning' is not served"),
        ("vera_of_c_attn", "fused"),
        ("classification_head", "heads.foo"),
    ],
)
def test_what_the_library_saves_and_nothing_here_serves(
    name: str, reason: str, base: Callable[[str], ServedBase]
) -> None:
    with pytest.raises(AdapterUnsupported, match=reason):
        lower(REFUSED / name, base("llama"), 1 << 30)


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_an_unknown_field_is_refused(name: str, serve: Serve) -> None:
    with pytest.raises(AdapterUnsupported, match="new_field"):
        serve(name, with_fields(checkpoint_of(folder(name)), new_field=1))


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_an_unknown_field_of_the_envelope_is_refused(name: str, serve: Serve) -> None:
    saved = checkpoint_of(folder(name))
    with pytest.raises(AdapterUnsupported, match="new_field"):
        serve(name, replace(saved, config={**saved.config, "new_field": 1}))


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_every_tensor_must_be_there(name: str, serve: Serve) -> None:
    saved = checkpoint_of(folder(name))
    for key in saved.tensors:
        part = key.rpartition(f".{ADAPTER}.")[2]
        copies = [other for other in saved.tensors if other.endswith(part)]
        missing = copies if ".prefix_tunings." in key else [key]
        with pytest.raises(AdapterError):
            serve(name, with_tensors(saved, dict.fromkeys(missing)))


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_every_tensor_must_have_its_shape(name: str, serve: Serve) -> None:
    saved = checkpoint_of(folder(name))
    for key, tensor in saved.tensors.items():
        twice = torch.cat([tensor, tensor])
        for wrong in (tensor[:-1], tensor[None], tensor.new_zeros(()), twice):
            with pytest.raises(AdapterError):
                serve(name, with_tensors(saved, {key: wrong}))


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_another_tensor_is_refused_by_name(name: str, serve: Serve) -> None:
    saved = checkpoint_of(folder(name))
    key = next(iter(saved.tensors))
    for other in (f"{key}_new", "model.layers.0.mlp.gate_proj.weight", f"new.{key}", key[1:]):
        with pytest.raises(AdapterError):
            serve(name, with_tensors(saved, {other: torch.randn(2, 2)}))


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_integers_are_no_weights(name: str, serve: Serve) -> None:
    saved = checkpoint_of(folder(name))
    key, tensor = next(iter(saved.tensors.items()))
    with pytest.raises(AdapterUnsupported, match="int64"):
        serve(name, with_tensors(saved, {key: tensor.long()}))


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_an_empty_file_is_corrupt(name: str, serve: Serve) -> None:
    with pytest.raises(AdapterCorrupt, match="no tensor"):
        serve(name, replace(checkpoint_of(folder(name)), tensors={}))


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_another_base_is_a_mismatch(
    name: str, base: Callable[[str], ServedBase], tiny_model: Callable[..., Any]
) -> None:
    saved = checkpoint_of(folder(name))
    layers = "n_layer" if name.startswith("gpt2") else "num_hidden_layers"
    deeper = load_base(tiny_model(name.split("/")[0], **{layers: 3}), torch.float32)
    for other in (base("qwen3"), deeper):
        if name == "llama/loreft_rank_4" and other is deeper:
            continue  # layers [0] fit a deeper base
        with pytest.raises(AdapterMismatch, match="made for another base"):
            lower_checkpoint(saved, folder(name), other)


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_another_width_is_a_mismatch(name: str, tiny_model: Callable[..., Any]) -> None:
    saved = checkpoint_of(folder(name))
    family = name.split("/")[0]
    fields = {"n_embd": 32} if family == "gpt2" else {"hidden_size": 32, "intermediate_size": 40}
    narrow = load_base(tiny_model(family, **fields), torch.float32)
    for config in ({**saved.config, "hidden_size": 32}, saved.config):
        with pytest.raises(AdapterMismatch, match="made for another base"):
            lower_checkpoint(replace(saved, config=config), folder(name), narrow)


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_hostile_values_are_errors_of_the_adapter(name: str, serve: Serve) -> None:
    """Or they are served: what a value like 0 means in some fields. Nothing else may happen."""
    saved = checkpoint_of(folder(name))
    inner = saved.config["config"]
    assert isinstance(inner, dict)
    refused = 0
    for field in inner:
        for value in HOSTILE:
            try:
                serve(name, with_fields(saved, **{field: value}))
            except AdapterError:
                refused += 1
    assert refused > 2 * len(inner)


@pytest.mark.parametrize("field", ["name", "model_type", "version", "hidden_size", "config"])
def test_hostile_envelopes_are_errors_of_the_adapter(field: str, serve: Serve) -> None:
    saved = checkpoint_of(folder("llama/lora"))
    for value in (*HOSTILE, "a.b", "adapters.one", "(", "x" * 999):
        if field == "hidden_size" and value is None:
            continue  # the library writes null where a model has none
        if field == "version" and value in ("8", "all", "a.b", "("):
            continue  # versions of adapter-transformers were free text
        with pytest.raises(AdapterError):
            serve("llama/lora", replace(saved, config={**saved.config, field: value}))


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("llama/seq_bn", {"reduction_factor": 4}, "reduction_factor is 4 of 64"),
        ("llama/seq_bn", {"reduction_factor": {"1": 16}}, "'reduction_factor' is None"),
        ("llama/seq_bn", {"leave_out": [1]}, "layers.1.output_adapters"),
        ("llama/seq_bn", {"output_adapter": False}, "layers.0.output_adapters"),
        ("llama/seq_bn", {"scaling": "learned"}, "has no scaling"),
        ("llama/scaled_par_bn", {"scaling": 4.0}, "'scaling' of"),
        (
            "llama/scaled_par_bn",
            {"scaling": "channel"},
            "scaling of .* is \\[1\\], and not \\[64\\]",
        ),
        ("llama/seq_bn", {"scaling": "trained"}, "'scaling' is 'trained'"),
        ("llama/seq_bn", {"non_linearity": "mish"}, "'non_linearity' is 'mish'"),
        ("llama/seq_bn", {"phm_layer": True}, "has no"),
        ("llama/compacter", {"phm_dim": 2}, "phm_dim is 2"),
        ("llama/compacter", {"phm_rank": 3}, "the rank 3"),
        ("llama/compacter", {"phm_bias": False}, "'adapter_down.0.b' of"),
        ("llama/compacter", {"shared_phm_rule": False}, "shared tensor 'phm_rule'"),
        ("llama/compacter", {"shared_W_phm": True}, "has no W_down_left"),
        ("llama/lora", {"r": 3}, "rank 3"),
        ("llama/lora", {"leave_out": [0]}, "leaves out \\[0\\]"),
        ("llama/lora", {"attn_matrices": ["q"]}, "adapts 1 modules"),
        ("llama/lora", {"intermediate_lora": True}, "adapts 3 modules"),
        ("gpt2/lora", {"attn_matrices": ["q"]}, "1 blocks of rank"),
        ("llama/lora", {"composition_mode": "concat"}, "'composition_mode' is 'concat'"),
        ("llama/lora", {"use_dora": True}, "has no m.weight"),
        ("llama/lora", {"vera_d": 0.1}, "shared matrices"),
        ("llama/ia3", {"r": 2}, "r is 2"),
        ("llama/ia3", {"composition_mode": "add"}, "has no lora_A"),
        ("llama/prefix_mlp", {"prefix_length": 4}, "not \\[4, 64\\]"),
        ("llama/prefix_mlp", {"bottleneck_size": 16}, "not \\[16, 64\\]"),
        ("llama/prefix_mlp", {"flat": True}, "has no self_prefix.control_trans"),
        ("llama/prefix_flat", {"prefix_length": 5}, "not for 5 positions"),
        ("llama/noreft", {"r": 3}, "not \\[3, 64\\]"),
        ("llama/noreft", {"layers": [0]}, "changes the layers"),
        ("llama/noreft", {"orthogonality": True}, "has no units.0.projection.parametrizations"),
        ("llama/noreft", {"tied_weights": True}, "'units.1"),
        ("llama/noreft", {"prefix_positions": 0}, "no positions"),
        ("llama/noreft", {"output_reft": False}, "does nothing"),
        ("llama/union_lora_seq_bn", {"configs": []}, "'configs' is"),
        ("llama/union_lora_seq_bn", {"configs": [{"architecture": "new"}]}, "'new'"),
    ],
)
def test_a_configuration_that_the_tensors_contradict(
    name: str, fields: dict[str, object], reason: str, serve: Serve
) -> None:
    with pytest.raises(AdapterError, match=reason):
        serve(name, with_fields(checkpoint_of(folder(name)), **fields))


def test_copies_of_a_prefix_must_be_equal(serve: Serve) -> None:
    saved = checkpoint_of(folder("llama/prefix_flat"))
    key = next(name for name in saved.tensors if ".pool." in name)
    with pytest.raises(AdapterCorrupt, match="differ"):
        serve("llama/prefix_flat", with_tensors(saved, {key: saved.tensors[key] + 1}))


def test_a_prefix_longer_than_the_base_is_refused(serve: Serve) -> None:
    saved = checkpoint_of(folder("llama/prefix_flat"))
    longer = dict.fromkeys(saved.tensors, torch.randn(257 * 128))
    with pytest.raises(AdapterUnsupported, match="257 positions"):
        serve("llama/prefix_flat", with_fields(with_tensors(saved, longer), prefix_length=257))


def test_a_narrow_file_does_not_make_a_wide_compacter(serve: Serve) -> None:
    """A few numbers in the file would be a matrix of hundreds of megabytes."""
    name = "llama/compacter"
    saved = checkpoint_of(folder(name))
    wide: dict[str, torch.Tensor | None] = {}
    for key in saved.tensors:
        if key.endswith("adapter_down.0.W_right"):
            wide[key] = torch.randn(4, 1, 1 << 20)
        elif key.endswith("adapter_down.0.b"):
            wide[key] = torch.randn(1 << 22)
        elif key.endswith("adapter_up.W_left"):
            wide[key] = torch.randn(4, 1 << 20, 1)
    with pytest.raises(AdapterUnsupported, match="wider than the hidden size"):
        serve(name, with_tensors(saved, wide))


def test_a_row_of_length_zero_cannot_be_scaled_to_a_magnitude(
    base: Callable[[str], ServedBase], serve: Serve
) -> None:
    saved = checkpoint_of(folder("llama/dora"))
    target = base("llama").layout.targets["model.layers.0.self_attn.q_proj"]
    weight = base("llama").linear(target).weight
    stem = f"{target.path}.loras.foo"
    a, b = torch.zeros(3, 64), torch.zeros(64, 3)
    a[0], b[0, 0] = -weight[0], 1.0
    with pytest.raises(AdapterUnsupported, match="length zero"):
        serve(
            "llama/dora",
            with_tensors(saved, {f"{stem}.lora_A": a, f"{stem}.lora_B": b}),
        )


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("gpt2/lora", {"use_dora": True}, "fused Conv1D"),
        ("gpt2/lora_mlp", {"use_dora": True}, "has no m.weight"),
    ],
)
def test_dora_on_gpt2_is_refused(
    family: str, fields: dict[str, object], reason: str, serve: Serve
) -> None:
    with pytest.raises(AdapterError, match=reason):
        serve(family, with_fields(checkpoint_of(folder(family)), **fields))


def test_dora_on_a_conv1d_is_refused(serve: Serve) -> None:
    name = "gpt2/lora_mlp"
    saved = checkpoint_of(folder(name))
    magnitudes = {
        key.replace("lora_B", "m.weight"): torch.randn(len(tensor), 1)
        for key, tensor in saved.tensors.items()
        if key.endswith("lora_B")
    }
    with pytest.raises(AdapterUnsupported, match="Conv1D"):
        serve(name, with_fields(with_tensors(saved, magnitudes), use_dora=True))


def test_a_square_orthogonal_projection_is_refused(serve: Serve) -> None:
    name = "llama/loreft_rank_4"
    saved = checkpoint_of(folder(name))
    square: dict[str, torch.Tensor | None] = {}
    for key in saved.tensors:
        if key.endswith(("source.weight", "weight.original")):
            square[key] = torch.randn(64, 64)
        elif key.endswith("source.bias"):
            square[key] = torch.randn(64)
    with pytest.raises(AdapterUnsupported, match="every r below is"):
        serve(name, with_fields(with_tensors(saved, square), r=64))


def test_reft_behind_a_bottleneck_is_refused(serve: Serve) -> None:
    """The library's ReFT reads what the bottleneck gave; the primitives read the base."""
    name = "llama/noreft"
    reft, bottleneck = checkpoint_of(folder(name)), checkpoint_of(folder("llama/seq_bn"))
    union = {
        "architecture": "union",
        "configs": [reft.config["config"], bottleneck.config["config"]],
    }
    both = replace(
        reft,
        config={**reft.config, "config": union},
        tensors={**reft.tensors, **bottleneck.tensors},
    )
    with pytest.raises(AdapterUnsupported, match="ReFT behind a bottleneck"):
        serve(name, both)


def test_two_configurations_of_a_union_that_claim_the_same_tensors(serve: Serve) -> None:
    name = "llama/union_lora_seq_bn"
    saved = checkpoint_of(folder(name))
    inner = saved.config["config"]
    assert isinstance(inner, dict)
    twice = [*inner["configs"], inner["configs"][0]]
    with pytest.raises(AdapterCorrupt, match="two configurations"):
        serve(name, with_fields(saved, configs=twice))


def test_a_head_that_is_no_language_models(serve: Serve) -> None:
    name = "llama/seq_bn_head"
    saved = checkpoint_of(folder(name))
    with pytest.raises(AdapterUnsupported, match=r"score\.weight"):
        serve(name, replace(saved, head={"score.weight": torch.randn(2, 64)}))
    with pytest.raises(AdapterMismatch, match="vocabulary of another size"):
        serve(name, replace(saved, head={"lm_head.weight": torch.randn(301, 64)}))


@pytest.mark.parametrize("value", [0, 1, "false", None, []])
def test_the_option_of_reft_is_true_or_false(value: object, serve: Serve) -> None:
    saved = checkpoint_of(folder("llama/noreft"))
    with pytest.raises(AdapterCorrupt, match="subtract_projection"):
        serve("llama/noreft", replace(saved, options={"subtract_projection": value}))


def test_other_methods_have_no_options(serve: Serve) -> None:
    saved = checkpoint_of(folder("llama/seq_bn"))
    with pytest.raises(AdapterUnsupported, match="subtract_projection"):
        serve("llama/seq_bn", replace(saved, options={"subtract_projection": False}))
