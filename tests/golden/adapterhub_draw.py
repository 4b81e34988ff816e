"""Random values for every tensor of an adapter: none stays at the zeros or ones it starts with."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel


def adapter_tensors(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The adapter's own parameters, each once."""
    marks = (
        "adapters",
        "loras",
        "refts",
        "prefix_tunings",
        "prefix_gates",
        "shared_parameters",
        "invertible_adapters",
        "prompt_tunings",
        "adapter_fusion_layer",
    )
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(f".{mark}." in name for mark in marks)
    }


def draw(model: PreTrainedModel, seed: int, size: float = 1.0) -> None:
    """Fill every tensor of the adapters with random values, none left at its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_tensors(model).items():
            noise = torch.randn(parameter.shape, generator=generator)
            _draw_one(name, parameter, noise, size)


def decay(model: PreTrainedModel) -> None:
    """Weight decay on one sign of ReFT's orthogonal parametrisation: torch truncates it to 0."""
    with torch.no_grad():
        for name, parameter in adapter_tensors(model).items():
            if name.endswith("parametrizations.weight.original"):
                parameter[1, 1] = -0.99


def _draw_one(name: str, parameter: nn.Parameter, noise: Tensor, size: float) -> None:
    vector = parameter.ndim == 1 or 1 in parameter.shape
    if name.endswith((".scaling", "m.weight", "norm_before.weight", "norm_after.weight")):
        parameter.mul_(1 + 0.3 * noise)
    elif name.endswith("parametrizations.weight.original"):
        diagonal = parameter.diagonal().clone()  # -1: torch keeps signs there, never trained
        parameter.copy_(0.3 * noise).diagonal().copy_(diagonal)
    elif name.endswith("lora_B") and parameter.shape[1] == 1 and _is_ones(parameter):
        parameter.copy_(1 + 0.5 * size * noise)  # IA3
    elif name.endswith("phm_rule") or "phm_rule_" in name:
        parameter.copy_(0.8 * noise)
    elif ".prefix_tunings." in name and name.endswith(("wte.weight", "control_trans")):
        parameter.copy_(noise * size)
    elif "adapter_down.0.weight" in name and vector:
        parameter.mul_(1 + 0.3 * noise)  # the norm, when it comes before the bottleneck
    else:
        parameter.copy_(noise * (0.2 if parameter.ndim == 1 else 0.25) * size)


def _is_ones(parameter: Tensor) -> bool:
    return bool((parameter == 1).all())


def require_random(folder: Path) -> None:
    """No tensor of the file is all zeros or all ones."""
    safe = folder / "adapter.safetensors"
    tensors = load_file(safe) if safe.exists() else torch.load(folder / "pytorch_adapter.bin")
    assert tensors, folder
    for name, tensor in tensors.items():
        assert float((tensor.float() - tensor.float().mean()).abs().max()) > 0 or (
            tensor.numel() == 1 and float(tensor) not in (0.0, 1.0)
        ), name
