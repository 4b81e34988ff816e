"""Tiny bases, adapters that PEFT made on them, and what both sides compute place by place."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltamux.adapters.base import Base
from deltamux.adapters.kind import Lowered
from deltamux.adapters.lower import lower
from deltamux.adapters.primitives.lowered import LoweredAdapter, Part
from deltamux.server.model.base import load_base

from .applied import Applied

ROOM = 1 << 30
"""Bytes, more than any adapter here takes."""
ROWS = 7


@dataclass(frozen=True)
class TinyBase:
    """One tiny model, as transformers and as we see it; the model is not to be changed."""

    folder: Path
    model: PreTrainedModel
    base: Base

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> "TinyBase":
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        )
        return cls(folder, model.eval(), load_base(folder, dtype))

    def lower(self, adapter: Path) -> LoweredAdapter:
        return lower(adapter, self.base, ROOM)

    def reload(self, adapter: Path) -> PeftModel:
        """The oracle: what PEFT computes from the folder, singular values in full precision.

        PEFT decomposes in float32, which costs it a digit or two that our sums keep.
        """
        with quiet(), mock.patch("torch.linalg.svd", _exact_svd(torch.linalg.svd)):
            return PeftModel.from_pretrained(copy.deepcopy(self.model), adapter).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """The oracle's warnings are not under test: it warns of much that it computes well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_adapter(
    tiny: TinyBase,
    folder: Path,
    config: PeftConfig,
    seed: int = 1,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    save_embedding_layers: bool | str = "auto",
) -> Path:
    """Save an adapter with every trained tensor drawn: its folder."""
    torch.manual_seed(seed)
    with quiet():
        model = get_peft_model(copy.deepcopy(tiny.model), config, adapter_name=adapter_name)
        shake(model)
        model.to(dtype or torch.float32)
        model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder if adapter_name == "default" else folder / adapter_name


def save_lora(tiny: TinyBase, folder: Path, **arguments: object) -> Path:
    """``save_adapter``; arguments that it does not know are LoraConfig's."""
    known = ("seed", "adapter_name", "dtype", "save_embedding_layers")
    own = {name: arguments.pop(name) for name in known if name in arguments}
    with quiet():
        config = LoraConfig(task_type="CAUSAL_LM", **arguments)
    return save_adapter(tiny, folder, config, **own)


@torch.no_grad()
def shake(model: nn.Module, size: float = 0.1) -> None:
    """Move everything that is trained away from where it began."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * size)


def inputs_for(path: str, width: int, rows: int = ROWS) -> Tensor:
    """The same input for the same module, whoever asks."""
    generator = torch.Generator().manual_seed(sum(path.encode()))
    return torch.randn(rows, width, generator=generator)


def peft_module(model: PeftModel, path: str) -> nn.Module:
    """The module that PEFT runs at this path, inside of what replaces whole modules."""
    module: nn.Module = model.get_base_model()
    for name in path.split("."):
        module = getattr(module, name)
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[model.active_adapter]
    return module


@torch.no_grad()
def peft_outputs(tiny: TinyBase, model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """Path -> output, for every linear module, norm and embedding of a model, bare or not."""
    layout = tiny.base.layout
    places = [(path, target.in_features) for path, target in layout.targets.items()]
    places += [(path, norm.size) for path, norm in layout.norms_by_path.items()]
    found = {}
    for path, width in places:
        found[path] = _module(model, path)(inputs_for(path, width).to(tiny.base.dtype))
    for path, site in layout.embeddings_by_path.items():
        found[path] = _module(model, path)(torch.arange(site.num_embeddings))
    return found


@torch.no_grad()
def our_outputs(tiny: TinyBase, adapter: LoweredAdapter) -> dict[str, Tensor]:
    """The same from the base's own modules and the adapter's primitives, part after part."""
    outputs = peft_outputs(tiny, tiny.model)
    for part in adapter.parts:
        outputs = _corrected(tiny, part, outputs)
    return outputs


def assert_equals_peft(
    tiny: TinyBase, folder: Path, oracle: PeftModel | None = None
) -> LoweredAdapter:
    """Every place of the base gives what PEFT's module there gives, and those we change change."""
    adapter = tiny.lower(folder)
    bare = peft_outputs(tiny, tiny.model)
    expected = peft_outputs(tiny, oracle or tiny.reload(folder))
    actual = our_outputs(tiny, adapter)
    changed = {each.path for each in adapter.primitives}
    assert changed
    for path, output in expected.items():
        assert bool((output - bare[path]).abs().max() > 1e-3) == (path in changed), path
        torch.testing.assert_close(
            actual[path], output, atol=1e-5, rtol=0, msg=lambda text, path=path: f"{path}: {text}"
        )
    return adapter


def edit_config(folder: Path, **fields: object) -> Path:
    """Change fields of the saved configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the saved tensors in place."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def _module(model: PreTrainedModel | PeftModel, path: str) -> nn.Module:
    return peft_module(model, path) if isinstance(model, PeftModel) else model.get_submodule(path)


def _corrected(tiny: TinyBase, part: Part, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layout = tiny.base.layout
    applied = Applied.of(Lowered((part,)), tiny.base)
    found = {}
    for path, target in layout.targets.items():
        x = inputs_for(path, target.in_features).to(tiny.base.dtype)
        found[path] = applied.corrected(target, outputs[path], x)
    for path, norm in layout.norms_by_path.items():
        module = tiny.model.get_submodule(path)
        centered = isinstance(module, nn.LayerNorm)
        eps = module.eps if centered else module.variance_epsilon
        x = inputs_for(path, norm.size).to(tiny.base.dtype)
        found[path] = applied.norm(norm, outputs[path], x, eps, centered)
    for path, site in layout.embeddings_by_path.items():
        rows = applied.embedding(site, torch.arange(site.num_embeddings))
        is_new = any(each.path == path for each in part.primitives)
        found[path] = rows if is_new else outputs[path]
    return found


def _exact_svd(svd: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    def exact(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, ...]:
        factors = svd(matrix.double(), full_matrices=full_matrices)
        return tuple(factor.to(matrix.dtype) for factor in factors)

    return exact
