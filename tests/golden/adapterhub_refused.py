"""What AdapterHub's library saves and no server of a shared frozen base can serve as it is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters.composition import Fuse, Stack
from adapters.wrappers.interfaces import CUSTOM_INTERFACES
from transformers import PreTrainedModel

import adapters
from adapters import (
    AdapterConfig,
    AdapterModelInterface,
    ConfigUnion,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
    VeraConfig,
)

FIRST, SECOND = "foo", "bar"
SMALL = {"reduction_factor": 16}


@dataclass(frozen=True)
class Refused:
    """One folder: ``configs`` are added under the names ``FIRST`` and ``SECOND``, then saved.

    Attributes:
        name: Folder.
        family: Base.
        configs: One, or two for what composes adapters.
        save: Writes the folder from the model with its random adapters.
    """

    name: str
    family: str
    configs: tuple[AdapterConfig, ...]
    save: Callable[[PreTrainedModel, Path], None]


def save_one(model: PreTrainedModel, folder: Path) -> None:
    model.save_adapter(str(folder), FIRST, with_head=False)


def save_fusion(model: PreTrainedModel, folder: Path) -> None:
    model.save_adapter_fusion(str(folder), Fuse(FIRST, SECOND))


def save_stack(model: PreTrainedModel, folder: Path) -> None:
    model.save_adapter_setup(str(folder), Stack(FIRST, SECOND))


def save_classifier(model: PreTrainedModel, folder: Path) -> None:
    model.add_classification_head(FIRST, num_labels=2)
    model.save_adapter(str(folder), FIRST, with_head=True)


def allow_prompt_tuning(model: PreTrainedModel) -> None:
    """A custom interface admits the method; adding and saving work, computing does not."""
    known = CUSTOM_INTERFACES["qwen2"].to_dict()
    methods = [*known["adapter_methods"], "prompt_tuning"]
    adapters.init(model, interface=AdapterModelInterface(**{**known, "adapter_methods": methods}))


def one(name: str, config: AdapterConfig, family: str = "llama") -> Refused:
    return Refused(name, family, (config,), save_one)


SMALL_PREFIX = PrefixTuningConfig(prefix_length=3, bottleneck_size=4)
REFUSED = (
    one(
        "unipelt",
        UniPELTConfig(SMALL_PREFIX, SeqBnConfig(**SMALL), LoRAConfig(r=2, alpha=2)),
    ),
    one("gated_seq_bn", SeqBnConfig(**SMALL, use_gating=True)),
    one("gated_lora", LoRAConfig(r=2, use_gating=True), "gpt2"),
    one("gated_ia3", IA3Config(use_gating=True), "qwen2"),
    one("gated_prefix", SMALL_PREFIX.replace(use_gating=True, shared_gating=False)),
    one("gated_union", ConfigUnion(SeqBnConfig(**SMALL), LoRAConfig(r=2, use_gating=True))),
    one(
        "invertible_nice_interface",
        SeqBnInvConfig(**SMALL, inv_adapter_reduction_factor=8),
        "qwen2",
    ),
    one(
        "invertible_glow",
        SeqBnConfig(**SMALL, inv_adapter="glow", inv_adapter_reduction_factor=8),
    ),
    one("post_add_residual", SeqBnConfig(**SMALL, residual_before_ln="post_add")),
    one("vera_of_c_attn", VeraConfig(r=2, attn_matrices=["v"], leave_out=[0]), "gpt2"),
    one("prompt_tuning", PromptTuningConfig(prompt_length=4), "qwen2_prompt_tuning"),
    Refused("fusion", "llama", (SeqBnConfig(**SMALL), SeqBnConfig(**SMALL)), save_fusion),
    Refused("stack", "llama", (SeqBnConfig(**SMALL), LoRAConfig(r=2)), save_stack),
    Refused("classification_head", "llama_adapter_model", (SeqBnConfig(**SMALL),), save_classifier),
)
