"""Bytes and operations of one decode step, from nothing but the shapes of a base and its adapters.

Counted is what a step cannot do without, each byte once, however it is implemented:

- weights: every matrix of the layers, the norms, the head, and the embedding's row of each token,
- cache: keys and values of every row's context, read, but those of its own token, written,
- adapters: A and B of all seven linear modules of each different adapter in the batch,
- prefixes: the keys and values of each different adapter's prefix,
- activations: what each linear site, the attention and the head read and write.

Not counted are norms, rotations and what else lies between the products, whose numbers need not
leave the processor; biases; sampling; index tables. Operations are those of the products: a
multiplication and an addition each count as one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from ..kernels.gpu.shapes import Shapes


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes to and from memory, and operations."""

    num_bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        """Both."""
        return Work(self.num_bytes + other.num_bytes, self.flops + other.flops)


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step: every row is a sequence that gets its next token.

    Attributes:
        rows: Sequences.
        context: Keys that a row attends to, its own included, beside an adapter's prefix.
        ranks: Of each different adapter in the batch. Every row has one, in equal parts; if there
            are more adapters than rows, some rows combine several.
        prefix_tokens: Of each adapter.
        number_bytes: Of a weight, key, value or activation.
    """

    rows: int
    context: int
    ranks: Sequence[int] = ()
    prefix_tokens: int = 0
    number_bytes: int = 2

    @property
    def rows_of_adapters(self) -> list[int]:
        """How many rows each adapter has."""
        count = len(self.ranks)
        return [max(self.rows // count + (i < self.rows % count), 1) for i in range(count)]


def count_step(shapes: Shapes, step: Step) -> dict[str, Work]:
    """The work of one step, by what it is done for."""
    return {
        "weights": count_weights(shapes, step),
        "cache": count_cache(shapes, step),
        "adapters": count_adapters(shapes, step),
        "prefixes": count_prefixes(shapes, step),
        "activations": Work(count_activations(shapes, step.rows) * step.number_bytes),
    }


def total(parts: Mapping[str, Work]) -> Work:
    """All of it."""
    return reduce(add, parts.values(), Work())


def count_weights(shapes: Shapes, step: Step) -> Work:
    """The base's: all but those rows of the embedding that no token of the step needs."""
    embedding = shapes.vocab * shapes.hidden
    looked_up = min(step.rows * shapes.hidden, 0 if shapes.tied_head else embedding)
    read = num_parameters(shapes) - (0 if shapes.tied_head else embedding) + looked_up
    products = linear_parameters(shapes) + embedding
    return Work(read * step.number_bytes, 2 * step.rows * products)


def count_cache(shapes: Shapes, step: Step) -> Work:
    """Attention to the context."""
    tokens = step.rows * step.context
    num_bytes = tokens * cache_numbers(shapes) * step.number_bytes
    return Work(num_bytes, step.rows * _attention_flops(shapes, step.context))


def count_adapters(shapes: Shapes, step: Step) -> Work:
    """LoRA on all seven linear modules; each adapter's A and B are read once."""
    numbers = sum(adapter_parameters(shapes, rank) for rank in step.ranks)
    products = sum(
        rows * adapter_parameters(shapes, rank)
        for rows, rank in zip(step.rows_of_adapters, step.ranks, strict=True)
    )
    return Work(numbers * step.number_bytes, 2 * products)


def count_prefixes(shapes: Shapes, step: Step) -> Work:
    """Attention to prefixes, each read once, however many rows share it."""
    tokens = len(step.ranks) * step.prefix_tokens
    flops = sum(step.rows_of_adapters) * _attention_flops(shapes, step.prefix_tokens)
    return Work(tokens * cache_numbers(shapes) * step.number_bytes, flops)


def count_activations(shapes: Shapes, rows: int) -> int:
    """Numbers that products read and write: of sites, of attention's queries, of the head."""
    sites = sum(inputs + sum(outputs) for _, inputs, outputs in shapes.sites)
    attention = 2 * shapes.heads * shapes.head_dim
    return rows * (shapes.layers * (sites + attention) + shapes.hidden + shapes.vocab)


def linear_parameters(shapes: Shapes) -> int:
    """Of all linear modules of the layers."""
    return shapes.layers * sum(inputs * sum(outputs) for _, inputs, outputs in shapes.sites)


def num_parameters(shapes: Shapes) -> int:
    """Of the base: linear modules, two norms a layer and a last one, embedding, and head."""
    norms = (2 * shapes.layers + 1) * shapes.hidden
    embeddings = (1 if shapes.tied_head else 2) * shapes.vocab * shapes.hidden
    return linear_parameters(shapes) + norms + embeddings


def adapter_parameters(shapes: Shapes, rank: int) -> int:
    """A (rank, in) and B (out, rank) of all linear modules of a LoRA."""
    widths = sum(inputs + out for _, inputs, outputs in shapes.sites for out in outputs)
    return shapes.layers * rank * widths


def cache_numbers(shapes: Shapes) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shapes.layers * shapes.kv_heads * shapes.head_dim


def _attention_flops(shapes: Shapes, keys: int) -> int:
    """Of one row: scores with all keys, and their sum of all values."""
    return 4 * shapes.layers * shapes.heads * shapes.head_dim * keys
