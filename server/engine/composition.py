"""What a request's adapters do to its sequence: what each corrects, and what is shared."""

import hashlib
from collections.abc import Iterator, Sequence

from ...adapters.layout import BaseLayout
from ...adapters.primitives.lowered import KVPrefix, LoweredAdapter, Part
from ...adapters.scope import Span
from ..composition import Composable, CompositionRefused, Room, check_composition
from ..generation import AdapterWeight, GenerationRequest
from ..scheduler.errors import SequenceRefused
from ..scheduler.sequence import Activation, AdapterUse, Prefix, Salt

Chosen = tuple[AdapterWeight, LoweredAdapter]


def composable(adapter: LoweredAdapter) -> Composable:
    """What decides whether the adapter can be combined with others."""
    prefix = adapter.prefix
    return Composable(
        obstacle=_obstacle(adapter),
        prefix_length=0 if prefix is None else prefix.length,
        shifts_positions=prefix is not None and bool(prefix.position_offset),
        prefix_layers=None if prefix is None else prefix.layers,
        takes=Room(adapter.num_bytes, adapter.num_device_bytes, len(adapter.parts)),
    )


def use_adapters(
    request: GenerationRequest, adapters: Sequence[LoweredAdapter], layout: BaseLayout
) -> AdapterUse:
    """How the request uses its adapters, given them in the order of ``request.adapters``.

    Raises:
        SequenceRefused: Their combination has no meaning; the message says why.
    """
    chosen = list(zip(request.adapters, adapters, strict=True))
    try:
        check_composition(
            [(_called(adapter), choice.weight, composable(adapter)) for choice, adapter in chosen]
        )
    except CompositionRefused as error:
        raise SequenceRefused(str(error)) from error
    activations, salts = [], []
    for choice, adapter in chosen:
        for index, part in enumerate(adapter.parts):
            span = part.scope.span(request.prompt_token_ids)
            if span is None:
                continue
            activations.append(
                Activation(choice.adapter_id, index, span.start, span.end, choice.weight)
            )
            if _changes_kv(part, layout):
                salts.append(Salt(span.start, _salt(choice, adapter, index, span)))
    prefix = _prefix(chosen)
    if prefix is not None:
        salts.append(Salt(0, prefix.name))
    return AdapterUse(
        adapter_ids=tuple(choice.adapter_id for choice, _ in chosen),
        activations=tuple(activations),
        prefix=prefix,
        salts=tuple(salts),
    )


def _obstacle(adapter: LoweredAdapter) -> str | None:
    for primitive in adapter.primitives:
        if not primitive.is_sum:
            return (
                f"it scales or replaces what the base computes ({type(primitive).__name__} at"
                f" {primitive.path}), and only what adds has a weighted sum"
            )
    if adapter.prefix is not None and adapter.prefix.embedded:
        return (
            "its soft prompt was computed through the bare base, and beside other adapters it would"
            " be another"
        )
    return None


def _prefix(chosen: Sequence[Chosen]) -> Prefix | None:
    found = list(_prefixes(chosen))
    if not found:
        return None
    name = hashlib.sha256()
    for _, adapter, _ in found:
        name.update(adapter.digest.encode())
    return Prefix(
        name=name.digest(),
        length=sum(prefix.length for _, _, prefix in found),
        position_offset=sum(prefix.position_offset for _, _, prefix in found),
        adapter_ids=tuple(choice.adapter_id for choice, _, _ in found),
        layers=found[0][2].layers,
    )


def _prefixes(chosen: Sequence[Chosen]) -> Iterator[tuple[AdapterWeight, LoweredAdapter, KVPrefix]]:
    for choice, adapter in chosen:
        if adapter.prefix is not None:
            yield choice, adapter, adapter.prefix


def _changes_kv(part: Part, layout: BaseLayout) -> bool:
    """Whether keys and values depend on the part: not, if it acts behind the last layer alone."""
    behind = {layout.head_path, layout.norms[-1].path}
    return any(primitive.path not in behind for primitive in part.primitives)


def _salt(choice: AdapterWeight, adapter: LoweredAdapter, part: int, span: Span) -> bytes:
    # The start too: one block may hold two places where the span could begin, an invocation in the
    # prompt and the same tokens in the output.
    return f"{adapter.digest}/{part}/{choice.weight!r}/{span.start}/".encode() + span.key


def _called(adapter: LoweredAdapter) -> str:
    return f"this {adapter.kind} adapter ({adapter.digest[:12]})"
