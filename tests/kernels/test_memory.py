"""Memory in huge pages: whole, dense, aligned, and nobody else's."""

import torch

from deltamux.kernels.memory import HugeMemory, allocator


def test_pieces_are_dense_aligned_and_apart() -> None:
    memory = HugeMemory(1 << 20)
    shapes = [(3, 5), (1,), (0, 4), (7, 11, 2), (1 << 19,)]
    pieces = [memory.empty(shape, torch.bfloat16) for shape in shapes]
    for index, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
        assert piece.shape == shape
        assert piece.is_contiguous()
        assert piece.data_ptr() % 64 == 0
        piece.fill_(index)
    for index, piece in enumerate(pieces):
        assert (piece == index).all()


def test_a_piece_outlives_what_gave_it_out() -> None:
    piece = HugeMemory(1 << 12).empty((1 << 11,), torch.int32)
    piece.copy_(torch.arange(1 << 11))
    others = [HugeMemory(1 << 12).empty((1 << 11,), torch.int32).fill_(-1) for _ in range(4)]
    assert torch.equal(piece, torch.arange(1 << 11, dtype=torch.int32))
    assert all((other == -1).all() for other in others)


def test_other_devices_allocate_their_own_way() -> None:
    piece = allocator(torch.device("meta"), 100)((2, 3), torch.float16)
    assert (piece.device.type, piece.shape, piece.dtype) == ("meta", (2, 3), torch.float16)
