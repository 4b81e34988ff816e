"""Segments of captured steps: equal numbers and bounds for batches whose launches may be equal."""

import pytest

from deltamux.kernels.tables import Segments


def ranges(*lengths: int) -> list[tuple[int, int, int, float]]:
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return [
        (start, start + length, slot, 1.0)
        for slot, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


@pytest.mark.parametrize(
    ("lengths", "count", "max_rows"),
    [
        ([1], 4, 1),
        ([1] * 4, 4, 1),
        ([1] * 5, 16, 1),
        ([2] * 16, 16, 4),
        ([2] * 17, 64, 4),
        ([8] * 8, 16, 16),
        ([60], 4, 64),
        ([1] * 64, 64, 1),
    ],
)
def test_a_gpus_are_padded_little(lengths: list[int], count: int, max_rows: int) -> None:
    segments = Segments.of(ranges(*lengths), 3, bucket=64, fine=True)
    assert len(segments.start) == len(segments.weight) == count
    assert (segments.max_rows, segments.max_inner) == (max_rows, 4)
    assert (segments.end - segments.start).tolist() == lengths + [0] * (count - len(lengths))
    assert sorted(segments.rows.tolist()) == list(range(64))


def test_there_are_never_more_than_rows() -> None:
    segments = Segments.of(ranges(1, 1, 1, 1, 1), bucket=8, fine=True)
    assert (len(segments.start), segments.max_rows) == (8, 1)
    assert len(Segments.of(ranges(1), bucket=2, fine=True).start) == 2


def test_a_cpus_are_padded_to_one_shape() -> None:
    few, many = (Segments.of(ranges(*[2] * count), bucket=64) for count in (2, 30))
    assert len(few.start) == len(many.start) == 64
    assert few.max_rows == many.max_rows == 16
