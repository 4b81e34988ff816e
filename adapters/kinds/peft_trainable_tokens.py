"""Trainable tokens as PEFT stores and computes them: new rows for some tokens of an embedding.

    row token_indices[i] = trainable_tokens_delta[i], despite the name the value itself,

in the embedding and, where the base has one weight for both, in the head. On such a base PEFT
stores the head's rows a second time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, shown
from ..formats.binding import embedding_site
from ..formats.config_fields import FieldRules
from ..formats.linear_adapter import HARMLESS, PeftKind, require_shape
from ..formats.overrides import head_row_primitives, merge, token_row_primitives
from ..formats.peft_tensors import by_module
from ..kind import KindPage, Lowered, PrimitiveShape
from ..primitives.embedding import EmbeddingRows
from ..primitives.lowered import Part
from ..primitives.primitive import Primitive
from ..scope import EveryPosition

_NAME = "trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class _ParsedTokens:
    """Token ids, and by module path their rows (tokens, size)."""

    tokens: tuple[int, ...]
    rows: Mapping[str, Tensor]

    @property
    def shapes(self) -> tuple[PrimitiveShape, ...]:
        return tuple(
            PrimitiveShape(EmbeddingRows.__name__, path, 0, rows.numel())
            for path, rows in self.rows.items()
        )

    def lower(self, base: Base) -> Lowered:
        return Lowered((Part(EveryPosition(), merge(self._primitives(base))),))

    def _primitives(self, base: Base) -> Iterator[Primitive]:
        layout = base.layout
        embedded = self.rows.get(layout.token_embedding.path) if layout.tied_head else None
        for path, values in self.rows.items():
            rows = dict(zip(self.tokens, values, strict=True))
            if path != layout.head_path:
                site = embedding_site(layout, path)
                is_tied = layout.tied_head and site == layout.token_embedding
                yield from token_row_primitives(base, rows, site, head=is_tied)
            elif embedded is None:
                yield from head_row_primitives(base, rows)
            elif not torch.equal(values, embedded):
                raise AdapterCorrupt(
                    f"{shown(path)} and the embedding are one weight in this base, and the file "
                    f"has two different sets of rows for them"
                )


def _read(checkpoint: Checkpoint) -> _ParsedTokens:
    tokens = _token_indices(checkpoint.config.get("token_indices"))
    modules = by_module(checkpoint.tensors, (_NAME,))
    rows = {path: parts[_NAME] for path, parts in modules.items()}
    for path, tensor in rows.items():
        require_shape(path, _NAME, tensor, len(tokens), None)
    return _ParsedTokens(tokens, rows)


def _token_indices(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(each) is int for each in value):
        raise AdapterCorrupt(
            f"the config field 'token_indices' is {shown(value)}, not a list of token ids"
        )
    if len(set(value)) < len(value):
        raise AdapterCorrupt("the config field 'token_indices' names a token twice")
    return tuple(value)


KIND = PeftKind(
    name="trainable_tokens",
    page=KindPage(
        title="Trainable tokens",
        family="specification",
        files="trainable_tokens_delta (tokens, hidden) of the embedding, and of the head where it "
        "was a target too or is tied; field token_indices",
        equation="the embedding's rows of these tokens are replaced; those of the head as well on "
        "a base whose head is the embedding",
        primitives=("EmbeddingRows", "OutputRows"),
        memory="tokens * hidden, once for embedding and head if they are tied",
        limits="Tokens beyond the base's vocabulary are refused, and so are modules other than "
        "embeddings and the head.",
    ),
    rules=FieldRules(implemented=frozenset({"token_indices"}), harmless=HARMLESS, refused={}),
    read=_read,
)
