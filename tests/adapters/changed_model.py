"""The oracle for replaced and added tensors: transformers' model with its parameters changed."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamux.adapters.formats.overrides import Mode, tensor_shape

from .peft_oracle import TinyBase


def drawn(tiny: TinyBase, names: Iterable[str]) -> dict[str, Tensor]:
    """A random tensor for each name."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor_shape(tiny.base.layout, name), generator=generator) * 0.3
        for name in names
    }


class BiasedRMSNorm(nn.Module):
    """What transformers' RMSNorm would be with a bias."""

    def __init__(self, norm: nn.Module, bias: Tensor) -> None:
        super().__init__()
        self.norm, self.bias = norm, nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.bias


@torch.no_grad()
def changed(tiny: TinyBase, tensors: Mapping[str, Tensor], mode: Mode) -> PreTrainedModel:
    """The oracle: the model with its parameters changed, embedding and head apart."""
    model = copy.deepcopy(tiny.model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    for name in sorted(tensors, reverse=True):  # weights before biases: these wrap norms
        path, _, part = name.rpartition(".")
        module = model.get_submodule(path)
        old, new = getattr(module, part, None), tensors[name]
        if old is None and "norm" in path:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, BiasedRMSNorm(module, new))
        elif old is None:
            module.bias = nn.Parameter(new)
        else:
            old.copy_(new if mode == "replace" else old + new)
    return model
