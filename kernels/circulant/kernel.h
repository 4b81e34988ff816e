// An adapter's part of add_circulant at one target.
#pragma once

#include "../cpu/tables.h"

// K (out / b, in / b, b)
template <class W>
struct CirculantKernel {
    int64_t b, in_size;
    const W* numbers;

    // The rows for the block of y that begins at this column and those behind it.
    const W* rows(int64_t column) const { return numbers + column / b * in_size; }
};

// Reads and checks a cell.
template <class W>
CirculantKernel<W> kernel_of(Cell<W>& cell, int64_t in_size, int64_t out_size) {
    CirculantKernel<W> kernel{cell[0], in_size, nullptr};
    const int64_t b = kernel.b;
    if (b > 0 && in_size % b == 0 && out_size % b == 0)
        kernel.numbers = cell.numbers(1, out_size / b, in_size);
    else cell.error = "a circulant block's size does not divide the target's";
    return kernel;
}
