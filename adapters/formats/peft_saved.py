"""What PEFT saves beside a kind's own tensors: whole modules, biases, embeddings, rows of tokens.

    <path>.weight, <path>.bias                   modules_to_save: they take the base's place
    <path>[.base_layer].bias                     bias="all", "lora_only": the same
    <path>[.base_layer].weight                   of embedding or head: a copy of the base's own
    <path>.token_adapter.trainable_tokens_delta  trainable_token_indices: new rows, despite the name

A copy is written in case the vocabulary was resized. PEFT loads it into the base, and where
embedding and head are one weight into both; one that equals the base's changes nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..kind import PrimitiveShape
from ..primitives.embedding import EmbeddingRows
from ..primitives.linear import Affine, OutputRows
from ..primitives.primitive import Primitive
from .binding import embedding_site
from .overrides import (
    head_row_primitives,
    merge,
    override_primitives,
    override_shapes,
    token_row_primitives,
)
from .peft_tensors import PREFIX, Reasons, require_float, unserved_tensor

_BASE_LAYER, _TOKENS = ".base_layer.", ".token_adapter.trainable_tokens_delta"
_KEPT, _INACTIVE = ".modules_to_save.", ".original_module."
_COPIED = ("embed_tokens", "lm_head", "wte")
"""Last names of the modules whose weight PEFT copies although it was not trained."""

_OTHERS: Reasons = (
    (".token_adapter.", "its module has trained tokens and is trained otherwise as well"),
    (".bias", "the config field 'bias' is 'none', and modules_to_save is empty"),
    (".weight", "the config field modules_to_save is empty"),
)


@dataclass(frozen=True, slots=True)
class SavedTensors:
    """The tensors of a checkpoint that do not belong to its kind.

    Attributes:
        replaced: Tensors in the place of the base's, by their names in its ``state_dict``.
        copies: Weights of embedding and head, by their names in the base's ``state_dict``.
        tokens: By module path: row (hidden,) by token id.
    """

    replaced: Mapping[str, Tensor]
    copies: Mapping[str, Tensor]
    tokens: Mapping[str, Mapping[int, Tensor]]

    @classmethod
    def read(
        cls, config: Mapping[str, object], tensors: Mapping[str, Tensor], others: Reasons = ()
    ) -> "SavedTensors":
        """Sort tensors that are not the kind's own.

        Args:
            config: Its ``bias``, ``modules_to_save`` and ``trainable_token_indices`` say what the
                tensors may be.
            tensors: By their names in the file.
            others: Why known other tensors are not served.

        Raises:
            AdapterUnsupported: A tensor of another name, or that does not hold floats.
            AdapterCorrupt: Tensors and configuration contradict each other.
        """
        biases, modules = _saves_biases(config), bool(config.get("modules_to_save"))
        replaced: dict[str, Tensor] = {}
        copies: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        for name, tensor in _local(tensors, others, modules).items():
            path, _, part = name.replace(_BASE_LAYER, ".").rpartition(".")
            if name.endswith(_TOKENS):
                deltas[name.removesuffix(_TOKENS)] = tensor
            elif _is_copy(name, path, part, modules):
                copies[f"{path}.{part}"] = tensor
            elif _is_replaced(name, part, biases, modules):
                replaced[f"{path}.{part}"] = tensor
            else:
                raise unserved_tensor(PREFIX + name, (*others, *_OTHERS))
        return cls(replaced, copies, _token_rows(config, deltas))

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        """What is replaced; a copy usually changes nothing."""
        rows = (
            PrimitiveShape(
                EmbeddingRows.__name__, path, 0, sum(row.numel() for row in by_id.values())
            )
            for path, by_id in self.tokens.items()
        )
        return (*override_shapes(self.replaced), *rows)

    def lower(self, base: Base) -> tuple[Primitive, ...]:
        """Their primitives, in the order of ``merge``.

        Raises:
            AdapterMismatch: The base has no such tensor or token, or of another shape.
            AdapterUnsupported: A tensor overflows, or one place is changed twice.
            AdapterCorrupt: Two different copies of one weight.
        """
        tensors = {**self._copied(base), **self.replaced}
        return merge((*override_primitives(base, tensors), *self._token_rows(base)))

    def _copied(self, base: Base) -> Mapping[str, Tensor]:
        layout = base.layout
        names = (f"{layout.token_embedding.path}.weight", f"{layout.head_path}.weight")
        found = [self.copies[name] for name in names if name in self.copies]
        if not layout.tied_head or not found:
            return self.copies
        if not torch.equal(found[0], found[-1]):
            raise AdapterCorrupt(f"{names[0]} and {names[1]} are one weight here, and two there")
        return {**self.copies, **dict.fromkeys(names, found[0])}

    def _token_rows(self, base: Base) -> Iterator[Primitive]:
        layout = base.layout
        for path, rows in self.tokens.items():
            if path == layout.head_path:
                yield from head_row_primitives(base, rows)
                continue
            site = embedding_site(layout, path)
            is_tied = layout.tied_head and site == layout.token_embedding
            head = is_tied and layout.head_path not in self.tokens
            yield from token_row_primitives(base, rows, site, head=head)


def replaced_weights(primitives: Iterable[Primitive]) -> frozenset[str]:
    """Paths of the modules whose whole weight, or rows of it, are not the base's."""
    return frozenset(
        each.path
        for each in primitives
        if isinstance(each, EmbeddingRows | OutputRows)
        or (isinstance(each, Affine) and each.scale is not None)
    )


def require_whole_rows(primitives: Iterable[Primitive]) -> None:
    """Raise AdapterUnsupported if a module with trained rows is changed otherwise as well.

    PEFT cannot wrap one module twice, and its rows would replace what the others add.
    """
    found = tuple(primitives)
    rows = {each.path for each in found if isinstance(each, OutputRows)}
    for each in found:
        if each.path in rows and not isinstance(each, OutputRows):
            raise AdapterUnsupported(
                f"{shown(each.path)} has rows of trained tokens and is changed otherwise as well: "
                f"train it with one of both"
            )


def _local(tensors: Mapping[str, Tensor], others: Reasons, modules: bool) -> dict[str, Tensor]:
    """By their names without the prefix, and without what no request ever reads.

    With bias="all", PEFT stores the biases of a module in modules_to_save three times: as its own,
    as those of the wrapper's copy, which are the same, and as those of the module it stands for.
    """
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise unserved_tensor(name, others)
        require_float(name, tensor)
        twin = tensors.get(name.replace(_KEPT, "."))
        is_twin = _KEPT in name and twin is not None and torch.equal(twin, tensor)
        if not (modules and (_INACTIVE in name or is_twin)):
            found[name.removeprefix(PREFIX)] = tensor
    return found


def _is_copy(name: str, path: str, part: str, modules: bool) -> bool:
    if part != "weight" or _KEPT in name or ".token_adapter." in name:
        return False
    return _BASE_LAYER in name or (not modules and path.rpartition(".")[2] in _COPIED)


def _is_replaced(name: str, part: str, biases: bool, modules: bool) -> bool:
    if _KEPT in name or _INACTIVE in name or ".token_adapter." in name:
        return False
    if _BASE_LAYER in name:
        return part == "bias" and biases
    return (modules and part in ("weight", "bias")) or (biases and part == "bias")


def _saves_biases(config: Mapping[str, object]) -> bool:
    """Any of PEFT's values goes where no bias was stored, as for a base that has none."""
    value = config.get("bias", "none")
    if value not in ("none", "all", "lora_only"):
        raise AdapterUnsupported(f"the config field 'bias' has the unknown value {shown(value)}")
    return value != "none"


def _token_rows(
    config: Mapping[str, object], deltas: Mapping[str, Tensor]
) -> dict[str, dict[int, Tensor]]:
    """Module path -> row by token id: the rows' order is that of the configuration's list."""
    field = config.get("trainable_token_indices")
    rows = {}
    for path, delta in deltas.items():
        ids = _token_ids(_listed(field, path))
        if delta.dim() != 2 or delta.shape[0] != len(ids):
            raise AdapterCorrupt(
                f"{shown(path)} has trained rows of {list(delta.shape)} for the {len(ids)} tokens "
                f"of the config field 'trainable_token_indices'"
            )
        rows[path] = dict(zip(ids, delta, strict=True))
    if field and not rows:
        raise AdapterCorrupt("the config field 'trainable_token_indices' is set, and no row stored")
    return rows


def _listed(field: object, path: str) -> object:
    """The list for this module: there is one for the embedding, or one by (the end of) a path."""
    if not isinstance(field, dict):
        return field
    found = [ids for name, ids in field.items() if path == name or path.endswith(f".{name}")]
    if len(found) != 1:
        raise AdapterCorrupt(
            f"the config field 'trainable_token_indices' has {len(found)} lists for {shown(path)}"
        )
    return found[0]


def _token_ids(value: object) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    ids = [each for each in listed if type(each) is int and each >= 0]
    if len(set(ids)) < len(listed):
        raise AdapterCorrupt(
            f"the config field 'trainable_token_indices' holds {shown(value)}, not different tokens"
        )
    return ids
