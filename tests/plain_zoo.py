"""Random deltas in deltamux's plain format, and what transformers computes with them.

No library writes this format. The oracle is the model itself with its parameters changed by hand.
Nothing of deltamux is imported.
"""

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .peft_zoo import Generation, PeftOracle

Tensors = dict[str, Tensor]
Draw = Callable[[PreTrainedModel, torch.Generator], Tensors]


@dataclass(frozen=True)
class PlainVariant:
    """One delta: its configuration, what is stored, and what that changes in a model.

    Attributes:
        name: Unique.
        kind: The ``delta_type``.
        config: Further fields.
        stored: (model, generator) -> the weight file.
        changes: The stored tensors -> tensors by their names in the state_dict.
    """

    name: str
    kind: str
    stored: Draw
    config: Mapping[str, object] = field(default_factory=dict)
    changes: Callable[[PreTrainedModel, Tensors], Tensors] = lambda _, stored: stored

    def save(self, model: PreTrainedModel, folder: Path, seed: int) -> Path:
        """Write the folder."""
        folder.mkdir(parents=True)
        stored = self.stored(model, torch.Generator().manual_seed(seed))
        config = {"delta_type": self.kind, "base_model": "tiny", **self.config}
        (folder / "delta_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(stored, folder / "delta.safetensors")
        return folder

    def generate(
        self, oracle: PeftOracle, prompt: list[int], max_tokens: int, seed: int
    ) -> Generation:
        """Greedy tokens of a model changed by hand."""
        changed = copy.copy(oracle)
        changed.model = copy.deepcopy(oracle.model)
        changes = self.changes(
            oracle.model, self.stored(oracle.model, torch.Generator().manual_seed(seed))
        )
        _change(changed.model, changes, add=self.config.get("mode") == "add")
        return changed.generate(prompt, max_tokens)


def _like(*, of: Callable[[str], bool], size: float) -> Draw:
    """Random tensors for the parameters whose names are chosen, around the base's for norms."""

    def draw(model: PreTrainedModel, generator: torch.Generator) -> Tensors:
        return {
            name: torch.randn(tensor.shape, generator=generator) * size
            + (tensor if tensor.dim() == 1 else 0)
            for name, tensor in model.state_dict().items()
            if of(name)
        }

    return draw


def _biases(model: PreTrainedModel, generator: torch.Generator) -> Tensors:
    """One for every linear module of the layers and for every norm, there before or not."""
    names: Tensors = {}
    for path, module in model.named_modules():
        if path == "lm_head" or getattr(module, "weight", None) is None:
            continue
        if isinstance(module, nn.Embedding):
            continue
        width = getattr(module, "out_features", getattr(module, "nf", module.weight.shape[0]))
        names[f"{path}.bias"] = torch.randn(width, generator=generator) * 0.3
    return names


def _last_layer(name: str) -> bool:
    return name.startswith(("model.layers.1.", "transformer.h.1."))


def _chosen(name: str) -> bool:
    ends = ("norm.weight", "ln_f.weight", "o_proj.weight", "c_proj.weight", "lm_head.weight")
    return name.endswith(ends) and "layers.0" not in name


def _both_if_tied(draw: Draw, *, add: bool) -> Draw:
    """On a tied base the embedding beside the head, unchanged: one alone is ambiguous."""

    def drawn(model: PreTrainedModel, generator: torch.Generator) -> Tensors:
        tensors = draw(model, generator)
        if model.config.tie_word_embeddings:
            path = next(p for p, m in model.named_modules() if m is model.get_input_embeddings())
            weight = model.get_input_embeddings().weight.detach()
            tensors[f"{path}.weight"] = torch.zeros_like(weight) if add else weight.clone()
        return tensors

    return drawn


SEED = 11


def _said_names(model: PreTrainedModel) -> list[str]:
    attention = ("layers.0.self_attn.v_proj.weight", "layers.1.self_attn.o_proj.weight")
    wanted = (*attention, "h.0.attn.c_proj.weight", "h.1.attn.c_proj.weight", "norm.weight")
    return [name for name in model.state_dict() if name.endswith(wanted)]


def _said(model: PreTrainedModel, generator: torch.Generator) -> Tensors:
    names = _said_names(model)
    return {
        "theta_d": torch.randn(50, generator=generator) * 20,
        "lambda": torch.randn(len(names), generator=generator) + 2,
    }


def _said_changes(model: PreTrainedModel, stored: Tensors) -> Tensors:
    """λ · [H G Π H B pad(θ)]_{:D} / (sqrt(L ΣG²) sqrt(D / L)), by matrices."""
    draw = torch.Generator().manual_seed(SEED)
    changes = {}
    for name, scale in zip(_said_names(model), stored["lambda"], strict=True):
        shape = model.state_dict()[name].shape
        size = 1 << math.ceil(math.log2(shape.numel()))
        signs = 2 * torch.randint(0, 2, (size,), dtype=torch.int8, generator=draw) - 1
        order = torch.randperm(size, dtype=torch.int32, generator=draw)
        gains = torch.randn(size, generator=draw).double()
        h = _hadamard(size)
        padded = torch.zeros(size, dtype=torch.float64)
        padded[: len(stored["theta_d"])] = stored["theta_d"].double()[:size]
        whole = h @ (gains * (h @ (signs * padded))[order.long()])
        length = math.sqrt(size * float((gains**2).sum())) * math.sqrt(shape.numel() / size)
        changes[name] = (scale * whole[: shape.numel()] / length).view(shape).float()
    return changes


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


class _BiasedNorm(nn.Module):
    def __init__(self, norm: nn.Module, bias: Tensor) -> None:
        super().__init__()
        self.norm, self.bias = norm, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.bias


@torch.no_grad()
def _change(model: PreTrainedModel, tensors: Tensors, *, add: bool) -> None:
    """Weights before biases, because these wrap norms; a tied head comes apart."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    for name in sorted(tensors, reverse=True):
        path, _, part = name.rpartition(".")
        module, new = model.get_submodule(path), tensors[name]
        old = getattr(module, part, None)
        if old is not None:
            old.copy_(old + new if add else new)
        elif isinstance(module, nn.Linear):
            module.bias = nn.Parameter(new)
        else:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, _BiasedNorm(module, new))


PLAIN_VARIANTS = (
    PlainVariant("bitfit", "bitfit", _biases, {"mode": "replace"}),
    PlainVariant("bitfit-added", "bitfit", _biases, {"mode": "add"}),
    PlainVariant("freeze", "freeze", _like(of=_last_layer, size=0.15), {"mode": "replace"}),
    PlainVariant(
        "tensors",
        "tensors",
        _both_if_tied(_like(of=_chosen, size=0.15), add=False),
        {"mode": "replace"},
    ),
    PlainVariant(
        "tensors-added",
        "tensors",
        _both_if_tied(_like(of=_chosen, size=0.05), add=True),
        {"mode": "add"},
    ),
)


def said_variant(model: PreTrainedModel) -> PlainVariant:
    """SAID names its tensors in the configuration, so it needs the model."""
    config = {"projection": "fastfood", "seed": SEED, "tensors": _said_names(model), "mode": "add"}
    return PlainVariant("said", "said", _said, config, _said_changes)
