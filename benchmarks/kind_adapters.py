"""Make random adapters of many kinds for the demo base, in the files of the libraries they are of.

PEFT makes and saves its own. Of the others the files are few and written here: AdapterHub cannot be
installed beside the server's transformers.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEP = 0.1
"""What is added to a parameter, as a part of the size that its own numbers have."""
REDUCTION = 16
_BOTTLENECK = "output_adapters.adapters.random"
_QUIETED = ("`is_gradient_checkpointing` is", "Unsupported layer type", "Sparse invariant checks")

WriteAll = Callable[[PreTrainedModel, list[Path]], None]
"""write(base, folders): a random adapter in each folder."""


@dataclass(frozen=True)
class KindSource:
    """One kind, as it is commonly configured.

    Attributes:
        name: In the report.
        made_of: Library and configuration, in words.
        write: Makes the adapters.
    """

    name: str
    made_of: str
    write: WriteAll


def _peft(name: str, config: type[PeftConfig], **fields: Any) -> KindSource:
    shown = ", ".join(f"{key}={value}" for key, value in fields.items() if value is not TARGETS)
    linear = " on every linear module" if "target_modules" in fields else ""

    def write(base: PreTrainedModel, folders: list[Path]) -> None:
        made = config(task_type="CAUSAL_LM", **copy.deepcopy(fields))
        with warnings.catch_warnings():
            for message in _QUIETED:
                warnings.filterwarnings("ignore", message=message)
            _write_peft(get_peft_model(copy.deepcopy(base), made), folders)

    return KindSource(name, f"PEFT {config.__name__}({shown}){linear}", write)


def _write_peft(model: PeftModel, folders: list[Path]) -> None:
    start = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    for folder in folders:
        _randomize(start)
        model.save_pretrained(str(folder))


@torch.no_grad()
def _randomize(start: dict[nn.Parameter, Tensor]) -> None:
    for parameter, value in start.items():
        usual = max(float(value.float().square().mean().sqrt()), value.shape[-1] ** -0.5)
        parameter.copy_(value + STEP * usual * torch.randn_like(value))


def _write_bottlenecks(base: PreTrainedModel, folders: list[Path]) -> None:
    hidden = base.config.hidden_size
    width = hidden // REDUCTION
    shapes = {
        "adapter_down.0.weight": (width, hidden),
        "adapter_down.0.bias": (width,),
        "adapter_up.weight": (hidden, width),
        "adapter_up.bias": (hidden,),
    }
    method = {
        **{"mh_adapter": False, "output_adapter": True, "reduction_factor": REDUCTION},
        **{"non_linearity": "relu", "original_ln_before": True, "original_ln_after": True},
        **{"residual_before_ln": True, "ln_before": False, "ln_after": False},
        **{"is_parallel": False, "scaling": 1.0, "use_gating": False, "phm_layer": False},
        **{"inv_adapter": None, "leave_out": []},
    }
    config = {
        **{"config": method, "hidden_size": hidden, "model_class": type(base).__name__},
        **{"model_name": "smollm2", "model_type": "llama", "name": "random"},
        "version": "adapters.1.3.0",
    }
    for folder in folders:
        tensors = {
            f"model.layers.{layer}.output_adapters.adapters.random.{name}": torch.randn(shape)
            * 0.02
            for layer in range(base.config.num_hidden_layers)
            for name, shape in shapes.items()
        }
        _write(folder, "adapter_config.json", config, "adapter.safetensors", tensors)


def _write_bitfit(base: PreTrainedModel, folders: list[Path]) -> None:
    config = {"delta_type": "bitfit", "base_model": "smollm2", "mode": "replace"}
    for folder in folders:
        tensors = {
            f"{path}.bias": 0.02 * torch.randn(module.out_features)
            for path, module in _linear_modules(base)
        }
        _write(folder, "delta_config.json", config, "delta.safetensors", tensors)


def _linear_modules(base: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in TARGETS:
            yield path, module


def _write(
    folder: Path, config_name: str, config: object, weights_name: str, tensors: dict[str, Tensor]
) -> None:
    folder.mkdir(parents=True)
    (folder / config_name).write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / weights_name)


LINEAR = {"target_modules": TARGETS}
SOURCES = (
    _peft("lora", peft.LoraConfig, r=16, **LINEAR),
    _peft("dora", peft.LoraConfig, r=16, use_dora=True, **LINEAR),
    _peft("ia3", peft.IA3Config),
    _peft("oft", peft.OFTConfig, oft_block_size=32, **LINEAR),
    _peft("lokr", peft.LoKrConfig, r=16, **LINEAR),
    _peft("vera", peft.VeraConfig, r=256, **LINEAR),
    _peft("fourierft", peft.FourierFTConfig, n_frequency=1000, **LINEAR),
    _peft("shira", peft.ShiraConfig, r=16, **LINEAR),
    _peft("c3a", peft.C3AConfig, block_size=64, **LINEAR),
    _peft("miss", peft.MissConfig, r=64, **LINEAR),
    _peft("prefix_tuning", peft.PrefixTuningConfig, num_virtual_tokens=20),
    _peft("prefix_tuning_10", peft.PrefixTuningConfig, num_virtual_tokens=10),
    _peft("prefix_tuning_200", peft.PrefixTuningConfig, num_virtual_tokens=200),
    _peft("prompt_tuning", peft.PromptTuningConfig, num_virtual_tokens=20),
    _peft("ln_tuning", peft.LNTuningConfig),
    KindSource(
        "bottleneck",
        f"AdapterHub SeqBnConfig(reduction_factor={REDUCTION}) behind every MLP",
        _write_bottlenecks,
    ),
    KindSource("bitfit", "plain: a bias of every linear module", _write_bitfit),
)
"""The kinds that are measured."""

OTHER_LENGTHS = ("prefix_tuning_10", "prefix_tuning_200")
"""Those of them that differ from another one in length only."""
