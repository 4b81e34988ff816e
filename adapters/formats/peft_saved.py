"""What PEFT saves beside a kind's own tensors: whole modules, biases, embeddings, rows of tokens.

    <path>.weight, <path>.bias                   modules_to_save: they take the base's place
    <path>[.base_layer].bias                     bias="all", "lora_only": the same
    <path>[.base_layer].weight                   of embedding or head: a copy of the base's own
    <path>.token_adapter.trainable_tokens_delta  trainable_token_indices: new rows, despite the name

with ``.base_layer`` where the module is adapted as well. A copy is written in case the vocabulary
was resized. PEFT loads it into the base, and where embedding and head are one weight into both; one
that equals the base's changes nothing.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ..base import Base
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..kind import PrimitiveShape
from ..layout import BaseLayout
from ..primitives.embedding import EmbeddingRows
from ..primitives.linear import Affine, OutputRows
from ..primitives.primitive import Primitive
from .binding import embedding_site, mismatch
from .config_fields import name_list
from .overrides import (
    head_row_primitives,
    merge,
    override_primitives,
    override_shapes,
    token_row_primitives,
)
from .peft_patterns import MAX_PATH_LENGTH
from .peft_tensors import PREFIX, Reasons, require_float, unserved_tensor

_MODULES_FIELD = "modules_to_save"
_TOKENS_FIELD = "trainable_token_indices"
_BASE_LAYER, _TOKENS = ".base_layer.", ".token_adapter.trainable_tokens_delta"
_KEPT, _INACTIVE = ".modules_to_save.", ".original_module."
_COPIED = ("embed_tokens", "lm_head", "wte")
"""Last names of the modules whose weight PEFT copies although it was not trained."""

_OTHERS: Reasons = (
    (_TOKENS, "it replaces rows of the embedding, and no config field says which"),
    (".token_adapter.", "its module has trained tokens and is trained otherwise as well"),
    (".base_layer.weight", "its module has no tensors of the adapter's own"),
    (
        ".bias",
        "the config field 'bias' is 'none', or has no such name for it, and modules_to_save does "
        "not name its module",
    ),
    (".weight", "the config field modules_to_save does not name its module"),
)


@dataclass(frozen=True, slots=True)
class SavedModules:
    """The field ``modules_to_save``: ends of the paths of modules that were trained as a whole."""

    names: tuple[str, ...]

    @classmethod
    def read(cls, config: Mapping[str, object]) -> "SavedModules":
        """Read it, missing or null for none.

        Raises:
            AdapterCorrupt: It is not a list of names.
            AdapterUnsupported: They are too many.
        """
        return cls(name_list(_MODULES_FIELD, config.get(_MODULES_FIELD)))

    def hold(self, path: str, prefix: str = PREFIX) -> bool:
        """Whether the module, or one that it is in, is named.

        Args:
            path: In the base.
            prefix: What PEFT puts before it.
        """
        if len(path) > MAX_PATH_LENGTH:
            return False
        whole = prefix + path
        ends = [index for index, character in enumerate(whole) if character == "."]
        return any(whole[:end].endswith(self.names) for end in (*ends, len(whole)))

    def require_saved(self, layout: BaseLayout, tensors: Iterable[str]) -> None:
        """Refuse a file without the modules that its configuration says were trained.

        A name that is none in the base is one that PEFT found none for either.

        Raises:
            AdapterCorrupt: The base has a module of a name, and none of the tensors is in it.
        """
        saved = {name.rpartition(".")[0] for name in tensors}
        places = {*layout.targets, *layout.norms_by_path, *layout.embeddings_by_path}
        for name in self.names:
            named = SavedModules((name,))
            if any(map(named.hold, places)) and not any(map(named.hold, saved)):
                raise AdapterCorrupt(
                    f"the config field {_MODULES_FIELD!r} names {shown(name)}, and the weight file "
                    f"holds nothing of it: it is incomplete"
                )


@dataclass(frozen=True, slots=True)
class SavedTensors:
    """The tensors of a checkpoint that do not belong to its kind.

    Attributes:
        replaced: Tensors in the place of the base's, by their names in its ``state_dict``.
        copies: Weights of embedding and head, by their names in the base's ``state_dict``.
        tokens: By module path: row (hidden,) by token id.
        modules: The modules that ``modules_to_save`` names.
    """

    replaced: Mapping[str, Tensor]
    copies: Mapping[str, Tensor]
    tokens: Mapping[str, Mapping[int, Tensor]]
    modules: SavedModules

    @classmethod
    def read(
        cls,
        config: Mapping[str, object],
        tensors: Mapping[str, Tensor],
        adapted: Collection[str],
        others: Reasons = (),
    ) -> "SavedTensors":
        """Sort tensors that are not the kind's own.

        Args:
            config: Its ``bias``, ``modules_to_save`` and ``trainable_token_indices`` say what the
                tensors may be.
            tensors: By their names in the file.
            adapted: Paths of the modules that have tensors of the kind's own.
            others: Why known other tensors are not served.

        Raises:
            AdapterUnsupported: A tensor of another name, or that does not hold floats.
            AdapterCorrupt: Tensors and configuration contradict each other.
        """
        rules = _Rules(
            modules=SavedModules.read(config),
            biases=_saves_biases(config),
            tokens=_TOKENS_FIELD in config,
            adapted=adapted,
        )
        found: dict[_Role, dict[str, Tensor]] = {role: {} for role in _Role}
        for name, tensor in tensors.items():
            if not name.startswith(PREFIX):
                raise unserved_tensor(name, others)
            local = name.removeprefix(PREFIX)
            role = rules.role(local)
            if role is None:
                raise unserved_tensor(name, (*others, *_OTHERS))
            require_float(name, tensor)
            _file(found, role, local, tensor)
        replaced, copies = found[_Role.REPLACED], found[_Role.COPY]
        for name in replaced.keys() & copies.keys():
            raise _twice(name)
        _require_same_twins(found[_Role.TWIN], replaced)
        return cls(replaced, copies, _token_rows(config, found[_Role.TOKENS]), rules.modules)

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
            AdapterMismatch: The base has no such tensor, bias or token, or of another shape.
            AdapterUnsupported: A tensor overflows, or one place is changed twice.
            AdapterCorrupt: Two different copies of one weight, or a module of ``modules_to_save``
                without any tensor.
        """
        self.modules.require_saved(base.layout, self.replaced)
        require_own_biases(base.layout, self.replaced)
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


def require_own_biases(layout: BaseLayout, names: Iterable[str]) -> None:
    """Raise AdapterMismatch for a bias of a module that has none: PEFT gives no module a new one.

    Args:
        layout: Of the base.
        names: Of replaced tensors, in its ``state_dict``.
    """
    for name in names:
        path, _, part = name.rpartition(".")
        module = layout.targets.get(path) or layout.norms_by_path.get(path)
        if part == "bias" and module is not None and not module.has_bias:
            raise mismatch(layout, f"{shown(path)} has a bias there, none here")


class _Role(Enum):
    """What a tensor of the file is."""

    REPLACED = "takes the place of the base's"
    COPY = "the base's own weight"
    TOKENS = "rows of trained tokens"
    TWIN = "another copy of one that is replaced"
    UNUSED = "of a module that stands aside"


@dataclass(frozen=True, slots=True)
class _Rules:
    """What the configuration lets a file hold."""

    modules: SavedModules
    biases: bool
    tokens: bool
    adapted: Collection[str]

    def role(self, name: str) -> _Role | None:
        """Of the tensor of this name, without the prefix; None if it has none.

        With bias="all", PEFT stores the biases of a module in modules_to_save three times: as its
        own, as those of the wrapper's copy, which are the same, and as those of the module it
        stands for, which no request ever reads.
        """
        path, _, part = name.rpartition(".")
        if name.endswith(_TOKENS):
            return _Role.TOKENS if self.tokens else None
        for infix, role in ((_KEPT, _Role.TWIN), (_INACTIVE, _Role.UNUSED)):
            if infix in name:
                module = path.removesuffix(infix.rstrip("."))
                is_third = part == "bias" and self.biases and self.modules.hold(module)
                return role if is_third else None
        if path.endswith(_BASE_LAYER.rstrip(".")):
            is_adapted = path.removesuffix(_BASE_LAYER.rstrip(".")) in self.adapted
            return self._of_adapted(part) if is_adapted else None
        if ".token_adapter." in name:
            return None
        return self._of_module(path, part)

    def _of_adapted(self, part: str) -> _Role | None:
        if part == "weight":
            return _Role.COPY
        return _Role.REPLACED if part == "bias" and self.biases else None

    def _of_module(self, path: str, part: str) -> _Role | None:
        if part not in ("weight", "bias"):
            return None
        if self.modules.hold(path) or (part == "bias" and self.biases):
            return _Role.REPLACED
        is_copied = part == "weight" and path.rpartition(".")[2] in _COPIED
        return _Role.COPY if is_copied else None


def _file(found: Mapping[_Role, dict[str, Tensor]], role: _Role, name: str, tensor: Tensor) -> None:
    """Put a tensor where its role says, by its name in the base."""
    if role is _Role.TOKENS:
        found[role][name.removesuffix(_TOKENS)] = tensor
        return
    in_base = name.replace(_BASE_LAYER, ".")
    if in_base in found[role]:
        raise _twice(in_base)
    found[role][in_base] = tensor


def _twice(name: str) -> AdapterCorrupt:
    return AdapterCorrupt(f"the weight file holds {shown(name)} of the base twice")


def _require_same_twins(twins: Mapping[str, Tensor], replaced: Mapping[str, Tensor]) -> None:
    for name, twin in twins.items():
        first = replaced.get(name.replace(_KEPT, "."))
        if first is None or not torch.equal(twin, first):
            raise AdapterUnsupported(
                f"the tensor {shown(PREFIX + name)} is not served: its module has another"
            )


def _saves_biases(config: Mapping[str, object]) -> bool:
    """Any of PEFT's values goes where no bias was stored, as for a base that has none."""
    value = config.get("bias", "none")
    if not isinstance(value, str) or not (value in ("none", "all") or value.endswith("_only")):
        raise AdapterUnsupported(f"the config field 'bias' has the unknown value {shown(value)}")
    return value != "none"


def _token_rows(
    config: Mapping[str, object], deltas: Mapping[str, Tensor]
) -> dict[str, dict[int, Tensor]]:
    """Module path -> row by token id: the rows' order is that of the configuration's list."""
    field = config.get(_TOKENS_FIELD)
    rows = {}
    for path, delta in deltas.items():
        ids = _token_ids(_listed(field, path))
        if delta.dim() != 2 or delta.shape[0] != len(ids):
            raise AdapterCorrupt(
                f"{shown(path)} has trained rows of {list(delta.shape)} for the {len(ids)} tokens "
                f"of the config field {_TOKENS_FIELD!r}"
            )
        rows[path] = dict(zip(ids, delta, strict=True))
    if field and not rows:
        raise AdapterCorrupt(f"the config field {_TOKENS_FIELD!r} is set, and no row stored")
    return rows


def _listed(field: object, path: str) -> object:
    """The list for this module: there is one for the embedding, or one by (the end of) a path."""
    if not isinstance(field, dict):
        return field
    found = [ids for name, ids in field.items() if path == name or path.endswith(f".{name}")]
    if len(found) != 1:
        raise AdapterCorrupt(
            f"the config field {_TOKENS_FIELD!r} has {len(found)} lists for {shown(path)}"
        )
    return found[0]


def _token_ids(value: object) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    ids = [each for each in listed if type(each) is int and each >= 0]
    if len(set(ids)) < len(listed):
        raise AdapterCorrupt(
            f"the config field {_TOKENS_FIELD!r} holds {shown(value)}, not different tokens"
        )
    return ids
