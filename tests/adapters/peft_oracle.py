"""Tiny base models of transformers, adapters on them by PEFT, and layouts read off the modules."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from deltamux.adapters.layout import BaseLayout, LinearSite, LinearTarget
from deltamux.adapters.primitives import LoweredAdapter, LowRank

HIDDEN, LAYERS, VOCAB = 64, 2, 97
ROOM = 1 << 30
"""Bytes, more than any adapter here takes."""
SITES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def build_base(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shared = {
        "hidden_size": HIDDEN,
        "intermediate_size": 80,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shared, tie_word_embeddings=False))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shared, tie_word_embeddings=True))
    return GPT2LMHeadModel(
        GPT2Config(n_embd=HIDDEN, n_layer=LAYERS, n_head=4, vocab_size=VOCAB, n_positions=32)
    )


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a Linear or of GPT-2's Conv1D."""
    out, inside = module.weight.shape
    return (out, inside) if isinstance(module, Conv1D) else (inside, out)


def layout_of(model: PreTrainedModel) -> BaseLayout:
    """Targets in the order of the modules; q, k, v and gate, up each share a site."""
    targets = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            inside, out = features(module)
            targets.append(LinearTarget(path, len(targets), inside, out))
    sites: list[list[LinearTarget]] = []
    for target in targets:
        parent, _, name = target.path.rpartition(".")
        group = next((group for group in SITES if name in group), (name,))
        if name == group[0]:
            sites.append([])
        sites[-1].append(target)
        assert parent == sites[-1][0].path.rpartition(".")[0]
    return BaseLayout(
        model_type=model.config.model_type,
        num_layers=model.config.num_hidden_layers,
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        sites=tuple(LinearSite(tuple(site)) for site in sites),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """The oracle's warnings are not under test: it warns of much that it computes well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_lora(
    base: PreTrainedModel,
    folder: Path,
    seed: int = 1,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    save_embedding_layers: bool | str = False,
    **config: object,
) -> Path:
    """Save a randomised adapter with PEFT, ``config`` being LoraConfig's: its folder."""
    torch.manual_seed(seed)
    config = {"task_type": "CAUSAL_LM", **config}
    with quiet():
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**config), adapter_name=adapter_name)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.1)
        model.to(dtype or torch.float32)
        model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder if adapter_name == "default" else folder / adapter_name


def reload(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The oracle: what PEFT computes from the folder."""
    with quiet():
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def peft_deltas(model: PeftModel, inputs: Callable[[str, int], Tensor]) -> dict[str, Tensor]:
    """Module path -> module(x) - base_layer(x), for every module that PEFT wrapped."""
    deltas = {}
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            x = inputs(path, features(module.base_layer)[0])
            with torch.no_grad():
                deltas[path] = module(x) - module.base_layer(x)
    return deltas


def inputs_for(path: str, width: int, rows: int = 7) -> Tensor:
    """The same input for the same module, whoever asks."""
    generator = torch.Generator().manual_seed(sum(path.encode()))
    return torch.randn(rows, width, generator=generator)


def our_deltas(adapter: LoweredAdapter, inputs: Callable[[str, int], Tensor]) -> dict[str, Tensor]:
    """Module path -> (x Aᵀ) B + c, from the primitives alone."""
    deltas: dict[str, Tensor] = {}
    for primitive in adapter.primitives:
        target = primitive.target
        x = inputs(target.path, target.in_features)
        if isinstance(primitive, LowRank):
            delta = (x @ primitive.a.T) @ primitive.b
        else:
            delta = primitive.bias.expand(len(x), -1)
        deltas[target.path] = deltas.get(target.path, torch.zeros(())) + delta
    return deltas


def edit_config(folder: Path, **fields: object) -> Path:
    """Change fields of the saved configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change the saved tensors in place."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder
