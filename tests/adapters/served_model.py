"""A lowered adapter on transformers' own model: what the primitives compute, without the server.

Hooks correct the outputs of the model's modules by the reference operations (``applied``), part by
part, at the positions of each part's scope. Keys and values of a prefix go into the cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from deltamux.adapters.base import Base
from deltamux.adapters.kind import Lowered
from deltamux.adapters.layout import Half
from deltamux.adapters.primitives.embedding import EmbeddingRows
from deltamux.adapters.primitives.layer import Bottleneck
from deltamux.adapters.primitives.linear import Affine, Dense
from deltamux.adapters.primitives.lowered import Part
from deltamux.adapters.primitives.primitive import Primitive

from .applied import Applied

SERVED = (Affine, Dense, EmbeddingRows, Bottleneck)


@dataclass(frozen=True)
class ServedModel:
    """A base and a lowered adapter.

    Attributes:
        model: In float32, with eager attention; it is left as it was after each call.
        base: The same base, as adapters are lowered for it.
        lowered: The adapter.
    """

    model: PreTrainedModel
    base: Base
    lowered: Lowered

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], prompt: Sequence[int]) -> Tensor:
        """Rows (len(ids), vocab) for a prompt and what was generated after it."""
        with ExitStack() as stack:
            for part in self.lowered.parts:
                span = part.scope.span(prompt)
                if span is not None:
                    rows = slice(span.start, span.end)
                    stack.enter_context(self._corrected(part, rows))
            return self.model(
                input_ids=torch.tensor([ids]),
                position_ids=torch.arange(len(ids))[None] + self._offset,
                past_key_values=self._cache(),
                use_cache=True,
            ).logits[0]

    @property
    def _offset(self) -> int:
        return 0 if self.lowered.prefix is None else self.lowered.prefix.position_offset

    def _cache(self) -> DynamicCache:
        cache, prefix = DynamicCache(), self.lowered.prefix
        if prefix is not None:
            for index, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
                cache.update(keys[None].clone(), values[None].clone(), index)
        return cache

    @contextmanager
    def _corrected(self, part: Part, rows: slice) -> Iterator[None]:
        applied = Applied.of(Lowered((part,)), self.base)
        handles = []
        for each in part.primitives:
            assert isinstance(each, SERVED), each
            handles += list(self._hooks(each, applied, rows))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, primitive: Primitive, applied: Applied, rows: slice) -> Iterator[Any]:
        if isinstance(primitive, Bottleneck):
            yield from self._half_hooks(primitive, applied, rows)
        elif isinstance(primitive, EmbeddingRows):
            site = primitive.site

            def embedded(_: nn.Module, args: Any, out: Tensor) -> Tensor:
                return _changed(out, rows, lambda _: applied.embedding(site, args[0][0, rows]))

            yield self._module(site.path).register_forward_hook(embedded)
        elif isinstance(primitive, Affine | Dense):
            target = primitive.target

            def linear(_: nn.Module, args: Any, out: Tensor) -> Tensor:
                x = args[0][0, rows].contiguous()
                return _changed(out, rows, lambda y: applied.corrected(target, y, x))

            twice = isinstance(primitive, Dense) and any(
                isinstance(each, Affine) and each.path == target.path
                for each in self.lowered.parts[0].primitives
            )
            if not twice:  # the applied adapter corrects by all of its primitives at once
                yield self._module(target.path).register_forward_hook(linear)

    def _half_hooks(self, primitive: Bottleneck, applied: Applied, rows: slice) -> Iterator[Any]:
        layer, half = primitive.layer, primitive.half
        stream: list[Tensor] = []

        def before(_: nn.Module, args: Any) -> None:
            stream[:] = [args[0]]

        def after(_: nn.Module, args: Any, out: Any) -> Any:
            plain = out[0] if isinstance(out, tuple) else out
            # Parts are a sum: each reads what the base computed, so their differences add up.
            own = getattr(plain, "uncorrected", plain)
            r = stream[0][0, rows].contiguous()
            delta = torch.zeros_like(own)
            h = own[0, rows].contiguous()
            delta[0, rows] = applied.half(layer, half, h, r) - h
            changed = plain + delta
            changed.uncorrected = own
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        attention = half is Half.ATTENTION
        norms = ("input_layernorm", "ln_1") if attention else ("post_attention_layernorm", "ln_2")
        block = self._module(layer.path)
        norm = next(getattr(block, name) for name in norms if hasattr(block, name))
        yield norm.register_forward_pre_hook(before)
        path = layer.attention_path if attention else f"{layer.path}.mlp"
        yield self._module(path).register_forward_hook(after)

    def _module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)


def _changed(out: Tensor, rows: slice, change: Any) -> Tensor:
    out = out.clone()
    out[0, rows] = change(out[0, rows].contiguous())
    return out
