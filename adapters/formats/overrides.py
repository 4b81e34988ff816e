"""Tensors that take the place of the base's own, or are added to them, as primitives.

Whole modules that were trained (PEFT's ``modules_to_save``), biases, norms, rows of trained tokens:
several kinds store some, under the names of the Hugging Face ``state_dict``.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from ..base import Base
from ..errors import AdapterUnsupported, shown
from ..kind import PrimitiveShape
from ..layout import BaseLayout, EmbeddingSite, LinearTarget, NormSite
from ..primitives.embedding import EmbeddingRows
from ..primitives.layer import NormOverride
from ..primitives.linear import Affine, Dense, OutputRows
from ..primitives.lowered import PRIMITIVE_TYPES
from ..primitives.primitive import Primitive
from .binding import cast, mismatch
from .peft_tensors import require_float

Mode = Literal["replace", "add"]
"""Whether a tensor is the new value of the base's, or what is added to it."""

_WEIGHT, _BIAS = "weight", "bias"
_EMBEDDINGS = ("embed_tokens", "wte", "wpe")


def override_primitives(
    base: Base, tensors: Mapping[str, Tensor], mode: Mode = "replace"
) -> tuple[Primitive, ...]:
    """Replace tensors of the base by others, or add to them.

        linear weight   replace: y = 0 * y + x Wᵀ + b      add: y += x Wᵀ
        linear bias     replace: y += b - base's b         add: y += b      (the base may have none)
        norm, embedding                replaced by the new value, or by the base's plus the given

    A tensor that changes nothing costs nothing, and neither does a row of an embedding. Embedding
    and head are two places, also where the base has one weight for both: what changes one leaves
    the other on the base's weight, as in PEFT.

    Args:
        base: The served base.
        tensors: By their names in the model's ``state_dict``, with the shapes of ``tensor_shape``.
        mode: What the tensors are.

    Returns:
        In the order of ``merge``.

    Raises:
        AdapterMismatch: The base has no such tensor, or it has another shape; names the tensor.
        AdapterUnsupported: A tensor does not hold floats, or overflows in the base's dtype.
    """
    found: list[Primitive] = []
    for path, parts in _by_module(base.layout, tensors).items():
        found += _module(base, path, parts, mode)
    return merge(found)


def tensor_shape(layout: BaseLayout, name: str) -> tuple[int, ...]:
    """Shape of the base's tensor of this name: (in, out) for the weights of GPT-2's ``Conv1D``.

    A linear module and a norm may be given a bias that the base has not.

    Raises:
        AdapterMismatch: The base has no such tensor.
    """
    path, _, part = name.rpartition(".")
    target, norm = layout.targets.get(path), layout.norms_by_path.get(path)
    embedding = layout.embeddings_by_path.get(path)
    if target is not None and part == _WEIGHT:
        shape = (target.out_features, target.in_features)
        return shape[::-1] if target.is_transposed else shape
    if target is not None and part == _BIAS:
        return (target.out_features,)
    if norm is not None and part in (_WEIGHT, _BIAS):
        return (norm.size,)
    if embedding is not None and part == _WEIGHT:
        return (embedding.num_embeddings, embedding.size)
    raise mismatch(layout, f"{shown(name)} is not a weight or bias of it")


def override_shapes(tensors: Mapping[str, Tensor]) -> tuple[PrimitiveShape, ...]:
    """What ``override_primitives`` makes of the tensors, as far as their names and shapes tell."""
    return tuple(_primitive_shape(name, tensors) for name in sorted(tensors))


def token_row_primitives(
    base: Base, rows: Mapping[int, Tensor], site: EmbeddingSite, head: bool
) -> tuple[Primitive, ...]:
    """Replace the rows of some tokens in an embedding, and in the head too if ``head``.

    Args:
        base: The served base.
        rows: New row (size,) by token id.
        site: The embedding.
        head: Whether the tokens' rows of the head become the same, stored once for both.

    Raises:
        AdapterMismatch: A token is not in the vocabulary, or a row has another width.
    """
    if not rows:
        return ()
    ids, values = _stacked(base, rows, site.path, site.num_embeddings, site.size)
    embedded = EmbeddingRows(site, values, ids)
    return (embedded, OutputRows(base.layout.head, ids, values)) if head else (embedded,)


def head_row_primitives(base: Base, rows: Mapping[int, Tensor]) -> tuple[Primitive, ...]:
    """Replace the rows (hidden,) of some tokens in the head alone; as ``token_row_primitives``."""
    if not rows:
        return ()
    head = base.layout.head
    ids, values = _stacked(base, rows, head.path, head.out_features, head.in_features)
    return (OutputRows(head, ids, values),)


def merge(primitives: Iterable[Primitive]) -> tuple[Primitive, ...]:
    """At most one primitive of each type at each place, by type and place.

    Several ``Affine`` at one target become one: their biases add up, and at most one may have a
    low-rank part, and one a scale. Each is taken as a correction of the base's own output: the
    scale multiplies that alone, not what the others add.

    Raises:
        AdapterUnsupported: Two primitives at one place cannot be one; names the place.
    """
    found: dict[tuple[int, int], Primitive] = {}
    for primitive in primitives:
        place = PRIMITIVE_TYPES.index(type(primitive)), primitive.row
        present = found.get(place)
        found[place] = primitive if present is None else _join(present, primitive)
    return tuple(found[place] for place in sorted(found))


def _join(first: Primitive, second: Primitive) -> Primitive:
    if not isinstance(first, Affine) or not isinstance(second, Affine):
        raise _twice(first, type(first).__name__)
    if first.a is not None and second.a is not None:
        raise _twice(first, "low-rank part")
    if first.scale is not None and second.scale is not None:
        raise _twice(first, "scale of its output")
    low_rank = second if first.a is None else first
    return Affine(
        first.target,
        a=low_rank.a,
        b=low_rank.b,
        bias=_sum(first.path, first.bias, second.bias),
        scale=second.scale if first.scale is None else first.scale,
    )


def _twice(primitive: Primitive, what: str) -> AdapterUnsupported:
    return AdapterUnsupported(
        f"{shown(primitive.path)} is changed twice ({what}): train it with one of the methods alone"
    )


def _sum(path: str, first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return cast(path, first.float() + second.float(), first.dtype)


def _by_module(layout: BaseLayout, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module path -> {"weight": ..., "bias": ...}, every shape checked."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        _check(layout, name, tensor)
        path, _, part = name.rpartition(".")
        modules.setdefault(path, {})[part] = tensor
    return modules


def _check(layout: BaseLayout, name: str, tensor: Tensor) -> None:
    shape = tensor_shape(layout, name)
    require_float(name, tensor)
    if tensor.shape == shape:
        return
    places = (f"{layout.token_embedding.path}.weight", f"{layout.head_path}.weight")
    resized = name in places and tensor.shape[1:] == shape[1:]
    why = "; a vocabulary of another size needs a base of its own" if resized else ""
    raise mismatch(layout, f"{name} is {list(tensor.shape)} there, {list(shape)} here{why}")


def _module(base: Base, path: str, parts: Mapping[str, Tensor], mode: Mode) -> Iterator[Primitive]:
    layout = base.layout
    if path in layout.targets:
        change = _replaced_linear if mode == "replace" else _added_linear
        yield from change(base, layout.targets[path], parts)
    elif path in layout.norms_by_path:
        yield from _norm(base, layout.norms_by_path[path], parts, mode)
    else:
        yield from _embedding(base, layout.embeddings_by_path[path], parts[_WEIGHT], mode)


def _replaced_linear(
    base: Base, target: LinearTarget, parts: Mapping[str, Tensor]
) -> Iterator[Primitive]:
    own = base.linear(target)
    weight = _linear_weight(base, target, parts)
    nothing = torch.zeros(target.out_features, dtype=base.dtype)
    old_bias = nothing if own.bias is None else own.bias
    bias = _new_value(target.path, old_bias, parts.get(_BIAS), "replace")
    if weight is not None and not torch.equal(weight, own.weight):
        yield Affine(target, bias=bias if bool(bias.any()) else None, scale=nothing)
        yield Dense(target, weight)
    else:
        yield from _added_bias(base, target, bias.float() - old_bias.float())


def _added_linear(
    base: Base, target: LinearTarget, parts: Mapping[str, Tensor]
) -> Iterator[Primitive]:
    weight, bias = _linear_weight(base, target, parts), parts.get(_BIAS)
    if weight is not None and bool(weight.any()):
        yield Dense(target, weight)
    if bias is not None:
        yield from _added_bias(base, target, bias)


def _added_bias(base: Base, target: LinearTarget, bias: Tensor) -> Iterator[Primitive]:
    if bool(bias.any()):
        yield Affine(target, bias=cast(target.path, bias, base.dtype))


def _linear_weight(base: Base, target: LinearTarget, parts: Mapping[str, Tensor]) -> Tensor | None:
    """(out, in), in the base's dtype."""
    stored = parts.get(_WEIGHT)
    if stored is None:
        return None
    return cast(target.path, stored.t() if target.is_transposed else stored, base.dtype)


def _norm(
    base: Base, site: NormSite, parts: Mapping[str, Tensor], mode: Mode
) -> Iterator[Primitive]:
    own = base.norm(site)
    old_bias = torch.zeros_like(own.weight) if own.bias is None else own.bias
    weight = _new_value(site.path, own.weight, parts.get(_WEIGHT), mode)
    bias = _new_value(site.path, old_bias, parts.get(_BIAS), mode)
    if not torch.equal(weight, own.weight) or not torch.equal(bias, old_bias):
        has_bias = site.has_bias or bool(bias.any())
        yield NormOverride(site, weight, bias if has_bias else None)


def _embedding(base: Base, site: EmbeddingSite, given: Tensor, mode: Mode) -> Iterator[Primitive]:
    own = base.embedding(site)
    rows = _new_value(site.path, own, given, mode)
    changed = (rows != own).any(dim=1)
    if bool(changed.all()):
        yield EmbeddingRows(site, rows)
    elif bool(changed.any()):
        yield EmbeddingRows(site, rows[changed], changed.nonzero()[:, 0].to(torch.int32))


def _new_value(path: str, old: Tensor, given: Tensor | None, mode: Mode) -> Tensor:
    """What the base's tensor ``old`` becomes, in its dtype."""
    if given is None:
        return old
    return cast(path, given if mode == "replace" else old.float() + given.float(), old.dtype)


def _stacked(
    base: Base, rows: Mapping[int, Tensor], path: str, count: int, size: int
) -> tuple[Tensor, Tensor]:
    """Token ids (n,) int32, ascending, and their rows (n, size)."""
    for token, row in rows.items():
        if not 0 <= token < count:
            raise mismatch(base.layout, f"{path} has {count} rows, none for token {shown(token)}")
        if row.shape != (size,):
            raise mismatch(
                base.layout, f"rows of {path} are {list(row.shape)} there, [{size}] here"
            )
    order = sorted(rows)
    values = cast(path, torch.stack([rows[token] for token in order]), base.dtype)
    return torch.tensor(order, dtype=torch.int32), values


def _primitive_shape(name: str, tensors: Mapping[str, Tensor]) -> PrimitiveShape:
    path, _, part = name.rpartition(".")
    weight = tensors.get(f"{path}.{_WEIGHT}")
    is_norm = weight is not None and weight.dim() == 1
    matrix = EmbeddingRows if path.endswith(_EMBEDDINGS) else Dense
    primitive = NormOverride if is_norm else Affine if part == _BIAS else matrix
    return PrimitiveShape(primitive.__name__, path, 0, tensors[name].numel())
