"""Bases that are refused: always by name, and before anything else happens."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.kernels.backend import reference_backend
from deltamux.server.model.errors import ModelCorrupt, ModelNotFound, ModelUnsupported
from deltamux.server.model.loader import load_model

TinyModel = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
EMBEDDING = "model.embed_tokens.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    load_model(folder, dtype, torch.device("cpu"), reference_backend())


@pytest.fixture
def copy_of(tiny_model: TinyModel, tmp_path: Path) -> Callable[..., Path]:
    def copy(family: str, **overrides: Any) -> Path:
        return shutil.copytree(tiny_model(family, **overrides), tmp_path / "model")

    return copy


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_unsupported_architecture_is_named_with_those_supported(copy_of: Any) -> None:
    folder = copy_of("llama")
    edit_config(folder, architectures=["MixtralForCausalLM"], model_type="mixtral")
    with pytest.raises(ModelUnsupported, match="MixtralForCausalLM") as error:
        load(folder)
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "GPT2"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "hidden_act", "gelu"),
        ("llama", "quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("qwen3", "layer_types", ["full_attention", "chunked_attention"]),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
    ],
)
def test_unsupported_field_is_named(copy_of: Any, family: str, field: str, value: object) -> None:
    folder = copy_of(family)
    edit_config(folder, **{field: value})
    with pytest.raises(ModelUnsupported, match=field):
        load(folder)


@pytest.mark.parametrize("model_type", ["granite", "mistral", "cohere"])
def test_a_model_type_of_another_family_is_refused(copy_of: Any, model_type: str) -> None:
    """Its fields would change the computation and are not among those that were judged."""
    folder = copy_of("llama")
    edit_config(folder, model_type=model_type, logits_scaling=8.0, embedding_multiplier=12.0)
    with pytest.raises(ModelUnsupported, match=f"model_type='{model_type}'.*supported: 'llama'"):
        load(folder)


@pytest.mark.parametrize("rope_type", ["yarn", "dynamic", "longrope"])
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_unsupported_rope_scaling_is_named(copy_of: Any, rope_type: str, field: str) -> None:
    folder = copy_of("llama")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    scaling = {
        "rope_type": rope_type,
        "factor": 2.0,
        "original_max_position_embeddings": 128,
        "long_factor": [1.0] * 8,
        "short_factor": [1.0] * 8,
    }
    edit_config(folder, **{field: scaling})
    with pytest.raises(ModelUnsupported, match=f"rope_type='{rope_type}'"):
        load(folder)


def test_partial_rotary_factor_is_refused(copy_of: Any) -> None:
    folder = copy_of("llama")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    edit_config(folder, rope_parameters=rope)
    with pytest.raises(ModelUnsupported, match="partial_rotary_factor"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_key_value_heads", 3),
        ("num_hidden_layers", 0),
        ("intermediate_size", -96),
        ("head_dim", 15),
        ("vocab_size", "many"),
        ("architectures", []),
        ("hidden_size", 2**40),
    ],
)
def test_impossible_sizes_are_refused(copy_of: Any, field: str, value: object) -> None:
    folder = copy_of("llama")
    edit_config(folder, **{field: value})
    with pytest.raises(ModelCorrupt):
        load(folder)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
        (lambda t: t.update({"model.layers.2.mlp.bias": torch.ones(3)}), "layers.2.mlp.bias"),
        (lambda t: t.update({EMBEDDING: torch.ones(299, 64)}), EMBEDDING),
        (lambda t: t[EMBEDDING][7].fill_(torch.nan), EMBEDDING),
        (lambda t: t[EMBEDDING][7, 3].fill_(-torch.inf), EMBEDDING),
    ],
    ids=["missing", "missing head", "unexpected", "other shape", "NaN", "Inf"],
)
def test_wrong_tensor_is_named(copy_of: Any, change: Any, name: str) -> None:
    folder = copy_of("llama")
    edit_tensors(folder, change)
    with pytest.raises(ModelCorrupt, match=name):
        load(folder)


def test_weights_beyond_the_range_of_the_serving_dtype_are_refused(copy_of: Any) -> None:
    folder = copy_of("llama")
    edit_tensors(folder, lambda tensors: tensors[EMBEDDING][0].fill_(1e6))
    with pytest.raises(ModelCorrupt, match="float16"):
        load(folder, torch.float16)


def test_integer_weights_are_refused(copy_of: Any) -> None:
    folder = copy_of("llama")
    integers = torch.ones(300, 64, dtype=torch.int8)
    edit_tensors(folder, lambda tensors: tensors.update({EMBEDDING: integers}))
    with pytest.raises(ModelUnsupported, match="int8"):
        load(folder)


def test_a_tied_head_with_other_weights_is_refused(copy_of: Any) -> None:
    folder = copy_of("qwen2")
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(300, 64)}))
    with pytest.raises(ModelCorrupt, match="tie_word_embeddings"):
        load(folder)


def test_a_tied_head_stored_twice_is_read(copy_of: Any) -> None:
    folder = copy_of("qwen2")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    load(folder)


@pytest.mark.parametrize("keep", [0, 7, 5000, -4])
def test_truncated_weights_are_refused(copy_of: Any, keep: int) -> None:
    folder = copy_of("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelCorrupt, match=r"model\.safetensors"):
        load(folder)


def test_a_missing_shard_is_named(copy_of: Any) -> None:
    folder = copy_of("llama", max_shard_size="50KB")
    next(folder.glob("model-00002-of-*")).unlink()
    with pytest.raises(ModelCorrupt, match="model-00002-of"):
        load(folder)


def test_a_tensor_in_two_shards_is_refused(copy_of: Any) -> None:
    folder = copy_of("llama", max_shard_size="50KB")
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    doubled = sorted(load_file(first))[0]
    save_file(load_file(last) | {doubled: load_file(first)[doubled]}, last)
    with pytest.raises(ModelCorrupt, match=f"{last.name}: tensor {doubled} is in another file"):
        load(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors", ".."])
def test_an_index_cannot_leave_the_folder(copy_of: Any, file: str) -> None:
    folder = copy_of("llama", max_shard_size="50KB")
    index = {"metadata": {}, "weight_map": {EMBEDDING: file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelCorrupt, match="of the folder"):
        load(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": 3}'])
def test_a_malformed_index_is_refused(copy_of: Any, content: str) -> None:
    folder = copy_of("llama", max_shard_size="50KB")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelCorrupt, match="index"):
        load(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"architectures": 3}'])
def test_a_malformed_config_is_refused(copy_of: Any, content: str) -> None:
    folder = copy_of("llama")
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelCorrupt, match=r"config\.json"):
        load(folder)


class Marker:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused_unopened(copy_of: Any, tmp_path: Path) -> None:
    folder = copy_of("llama")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    with pytest.raises(ModelUnsupported, match="pickle"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_model_is_refused(copy_of: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        load(tmp_path)
    folder = copy_of("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="safetensors"):
        load(folder)
