"""Drives a decoder over a paged cache as a scheduler would, the blocks of sequences mixed."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from deltamux.adapters.device.batch import AdapterBatch
from deltamux.kernels.paged_attention.op import PagedBatch
from deltamux.server.model.decoder import Decoder

Chunk = tuple[int, int, int]  # sequence, first and one past the last position


class PagedRun:
    """Runs chunks of given sequences; what no chunk has written to the cache is NaN."""

    def __init__(
        self, decoder: Decoder, sequences: Sequence[Sequence[int]], block_size: int, seed: int = 0
    ) -> None:
        self.decoder = decoder
        self.sequences = sequences
        self.block_size = block_size
        counts = [-(-len(tokens) // block_size) for tokens in sequences]
        blocks = list(range(sum(counts) + 3))
        random.Random(seed).shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(count)] for count in counts]
        self.kv = decoder.new_kv_cache(sum(counts) + 3, block_size)
        for tensor in (*self.kv.keys, *self.kv.values):
            tensor.fill_(torch.nan)

    def step(self, chunks: Sequence[Chunk], deltas: AdapterBatch | None = None) -> list[Tensor]:
        """Logits (positions, vocab) of each chunk."""
        tokens = [self.sequences[index][start:end] for index, start, end in chunks]
        positions = [list(range(start, end)) for _, start, end in chunks]
        with torch.inference_mode():
            hidden = self.decoder.forward(
                torch.tensor([token for part in tokens for token in part]),
                torch.tensor([position for part in positions for position in part]),
                self.kv,
                [self._batch(chunks)] * self.decoder.config.num_layers,
                deltas,
            )
            logits = self.decoder.logits(hidden, deltas)
        return list(logits.split([len(part) for part in tokens]))

    def _batch(self, chunks: Sequence[Chunk]) -> PagedBatch:
        lengths = [end - start for _, start, end in chunks]
        width = max(len(self.tables[index]) for index, _, _ in chunks)
        # what lies past a sequence's blocks is never read, so it may point nowhere
        tables = [
            self.tables[index] + [10**6] * (width - len(self.tables[index]))
            for index, _, _ in chunks
        ]
        slots = [
            self.tables[index][position // self.block_size] * self.block_size
            + position % self.block_size
            for index, start, end in chunks
            for position in range(start, end)
        ]
        return PagedBatch(
            cu_seqlens_q=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            context_starts=torch.zeros(len(chunks), dtype=torch.int32),
            context_lens=torch.tensor([end for _, _, end in chunks], dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
            max_seqlen_q=max(lengths),
            max_context_len=max(end for _, _, end in chunks),
        )


def random_schedule(
    lengths: Sequence[int], rng: random.Random, largest_chunk: int
) -> list[list[Chunk]]:
    """Steps that cover every position once: a random subset and order of sequences in each."""
    done = [0] * len(lengths)
    steps = []
    while open_ones := [index for index, length in enumerate(lengths) if done[index] < length]:
        chosen = rng.sample(open_ones, rng.randint(1, len(open_ones)))
        chunks = []
        for index in chosen:
            end = min(
                lengths[index], done[index] + rng.choice((1, 1, rng.randint(1, largest_chunk)))
            )
            chunks.append((index, done[index], end))
            done[index] = end
        steps.append(chunks)
    return steps
