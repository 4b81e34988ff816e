// A sparse matrix S (out, in) of an adapter, by rows, as ``op.py`` has it.
#pragma once

#include "../cpu/tables.h"

constexpr const char* OUTSIDE = "a sparse matrix has a column outside the input";

template <class W>
struct Entries {
    int64_t count, in_size, out_size;
    const int32_t *row_starts, *columns;
    const W* values;

    Entries(Cell<W>& cell, int64_t in_size, int64_t out_size)
        : count(cell[0]), in_size(in_size), out_size(out_size),
          row_starts(cell.indices(1, out_size + 1)), columns(cell.indices(2, count)),
          values(cell.numbers(3, count)) {}

    // What is wrong with where some of its rows start, or null.
    const char* check_starts(int64_t row, int64_t rows) const {
        const int32_t* starts = row_starts + row;
        int32_t descends = starts[0] < 0 || starts[rows] > count;
        for (int64_t o = 0; o < rows; ++o) descends |= starts[o] > starts[o + 1];
        return descends ? "a sparse matrix's row starts do not ascend within its entries" : nullptr;
    }

    // What is wrong in the indices of some of its rows, or null.
    const char* check(int64_t row, int64_t rows) const {
        if (const char* error = check_starts(row, rows)) return error;
        const int32_t* starts = row_starts + row;
        return all_below(columns + starts[0], starts[rows] - starts[0], in_size) ? nullptr : OUTSIDE;
    }

    // Whether another matrix of the same size has its entries where this one has its own.
    bool same_places(const Entries& other) const {
        return count == other.count && same(row_starts, other.row_starts, out_size + 1) &&
               same(columns, other.columns, count);
    }

  private:
    static bool same(const int32_t* a, const int32_t* b, int64_t size) {
        return a == b || std::memcmp(a, b, size * sizeof *a) == 0;
    }
};
