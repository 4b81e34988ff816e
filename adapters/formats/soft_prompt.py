"""Soft prompts: rows that stand in the place of token embeddings before the prompt's own.

    x = [e_0 .. e_{P-1}, embedded tokens],   token i at position P + i

(prompt tuning, arXiv:2104.08691). As the base is causal, what it computes for the P rows is the
same for every request: their keys and values are computed once and are a prefix of the cache.
PEFT's prompt methods differ in how the rows come about, and store them all as
``prompt_embeddings``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..kind import Lowered, PrimitiveShape
from ..layout import BaseLayout
from ..primitives.lowered import KVPrefix, Part
from ..primitives.primitive import Primitive
from ..scope import EveryPosition
from .binding import cast, mismatch
from .config_fields import PEFT_HARMLESS, FieldRules, positive_int
from .linear_adapter import require_shape
from .overrides import override_primitives, override_shapes
from .peft_saved import SavedModules, require_own_biases
from .peft_tensors import Reasons, require_float, unserved_tensor

EMBEDDINGS = "prompt_embeddings"
MAX_PROMPT = 1024
"""Rows of a prompt, which the base computes when the adapter is loaded, and at once."""

_OTHERS: Reasons = ((".weight", "the config field modules_to_save does not name its module"),)
# PEFT does not wrap the base of these methods, so that modules_to_save has a shorter prefix.
_SAVED_PREFIX = "base_model."


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the file of a prompt method holds.

    Attributes:
        rows: ``prompt_embeddings`` (length, width).
        replaced: Tensors of ``modules_to_save``, by their names in the base's ``state_dict``.
        others: Further tensors that the method has, by their names.
    """

    rows: Tensor
    replaced: Mapping[str, Tensor]
    others: Mapping[str, Tensor]

    @classmethod
    def read(cls, checkpoint: Checkpoint, others: Iterable[str] = ()) -> "Prompt":
        """Take the file apart.

        Args:
            checkpoint: Its fields have been checked.
            others: Names of tensors that must be there beside the embeddings.

        Raises:
            AdapterCorrupt: A tensor is missing, or contradicts ``num_virtual_tokens``.
            AdapterUnsupported: An unknown tensor, or the prompt of an encoder-decoder model.
        """
        submodules = checkpoint.config.get("num_transformer_submodules")
        if submodules is not None and positive_int("num_transformer_submodules", submodules) != 1:
            raise AdapterUnsupported(
                "the config field 'num_transformer_submodules' is not 1: the prompt is of a model "
                "with encoder and decoder"
            )
        own = {name: _required(checkpoint, name) for name in (EMBEDDINGS, *others)}
        replaced = _replaced(checkpoint, own.keys())
        rows = own.pop(EMBEDDINGS)
        length = positive_int("num_virtual_tokens", checkpoint.config.get("num_virtual_tokens"))
        require_shape("the prompt", EMBEDDINGS, rows, length, None)
        return cls(rows, replaced, own)


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """A prompt method whose rows the base has to compute.

    Attributes:
        rows: (length, hidden).
        replaced: See ``Prompt``.
    """

    rows: Tensor
    replaced: Mapping[str, Tensor]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """The rows: what their keys and values take is known with the base."""
        rows = PrimitiveShape(KVPrefix.__name__, "", 0, self.rows.numel())
        return (rows, *override_shapes(self.replaced))

    def lower(self, base: Base) -> Lowered:
        """Let the base compute keys and values; see ``kind.ParsedAdapter``."""
        length, width = self.rows.shape
        if width != base.layout.hidden_size:
            raise mismatch(base.layout, f"its prompt has {width} features")
        require_room(base.layout, length)
        if length > MAX_PROMPT:
            raise AdapterUnsupported(f"the prompt has {length} rows, more than {MAX_PROMPT}")
        replaced = replaced_primitives(base, self.replaced)
        _require_same_prompt(base.layout, replaced)
        keys, values = base.encode(cast(EMBEDDINGS, self.rows, base.dtype))
        prefix = KVPrefix(
            cast(EMBEDDINGS, keys, base.dtype),
            cast(EMBEDDINGS, values, base.dtype),
            position_offset=length,
            embedded=True,
        )
        return Lowered(parts_of(replaced), prefix)


def prompt_rules(harmless: Mapping[str, str], implemented: Iterable[str] = ()) -> FieldRules:
    """The rules for a method whose configuration has these fields beside those of all."""
    return FieldRules(
        implemented=frozenset(
            {
                "num_virtual_tokens",
                "num_transformer_submodules",
                "token_dim",
                "modules_to_save",
                *implemented,
            }
        ),
        harmless={**PEFT_HARMLESS, **harmless},
        refused={},
    )


PROMPT_HARMLESS: Mapping[str, str] = {
    "num_layers": "a note on the base",
    "num_attention_heads": "a note on the base",
}
"""Fields of the methods whose prompt is rows of embeddings."""


def read_soft_prompt(checkpoint: Checkpoint) -> SoftPrompt:
    """A method that stores the finished rows and nothing else; see ``Prompt.read``."""
    prompt = Prompt.read(checkpoint)
    require_width(checkpoint.config, prompt.rows)
    return SoftPrompt(prompt.rows, prompt.replaced)


def require_width(config: Mapping[str, object], rows: Tensor) -> None:
    """Raise AdapterCorrupt unless ``token_dim``, if it is given, is the rows' width."""
    width = config.get("token_dim")
    if width is not None and positive_int("token_dim", width) != rows.shape[1]:
        raise AdapterCorrupt(
            f"the config field 'token_dim' is {width}, and {EMBEDDINGS} {list(rows.shape)}"
        )


def require_room(layout: BaseLayout, length: int) -> None:
    """Raise AdapterUnsupported unless a prefix leaves room for a token."""
    if length >= layout.max_position:
        raise AdapterUnsupported(
            f"the prefix takes {length} positions, and the base has {layout.max_position}"
        )


def replaced_primitives(base: Base, tensors: Mapping[str, Tensor]) -> tuple[Primitive, ...]:
    """Those of ``Prompt.replaced``; raises as ``override_primitives``."""
    require_own_biases(base.layout, tensors)
    return override_primitives(base, tensors)


def parts_of(primitives: tuple[Primitive, ...]) -> tuple[Part, ...]:
    """One part with these primitives, none without any."""
    return (Part(EveryPosition(), primitives),) if primitives else ()


def _required(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise AdapterCorrupt(f"the weight file has no tensor {name!r}")
    require_float(name, tensor)
    return tensor


def _replaced(checkpoint: Checkpoint, own: Iterable[str]) -> dict[str, Tensor]:
    modules = SavedModules.read(checkpoint.config)
    replaced = {}
    for name in sorted(checkpoint.tensors.keys() - set(own)):
        local = name.removeprefix(_SAVED_PREFIX)
        module = local.rpartition(".")[0]
        if local == name or not modules.hold(module, _SAVED_PREFIX):
            raise unserved_tensor(name, _OTHERS)
        require_float(name, checkpoint.tensors[name])
        replaced[local] = checkpoint.tensors[name]
    return replaced


def _require_same_prompt(layout: BaseLayout, replaced: Iterable[Primitive]) -> None:
    """The bare base computes the prompt, so nothing that it passes may be replaced.

    Nor the embedding: PEFT embeds the request's prompt by the base's, and then the output tokens by
    the one that was saved.
    """
    apart = {layout.head_path, layout.norms[-1].path}
    for primitive in replaced:
        if primitive.path not in apart:
            raise AdapterUnsupported(
                f"modules_to_save replaces {shown(primitive.path)}, and beside a soft prompt only "
                f"the last norm and the head can be"
            )
