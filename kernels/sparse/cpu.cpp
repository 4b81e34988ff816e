// add_sparse on the CPU. A unit of work is up to LANES rows of one segment and some rows of S: few rows
// one after the other, or all of them at once, transposed.
#include "../cpu/products.h"
#include "sums.h"

namespace {

constexpr int64_t BLOCK_ENTRIES = 1 << 14;  // of a unit, about: some microseconds of work

template <class T, class W>
struct Sparse {
    static constexpr int64_t BLOCK_ROWS = LANES;

    Entries<W> entries;

    Sparse(Cell<W>& cell, int64_t in_size, int64_t out_size) : entries(cell, in_size, out_size) {}

    int64_t columns() const { return entries.out_size; }
    int64_t block_columns() const {
        return padded(max_of(1, columns() * BLOCK_ENTRIES / max_of(1, entries.count)));
    }
    int64_t scratch() const { return sums_scratch(entries.in_size); }

    const char* compute(const Block<T>& block, float* scratch) const {
        if (const char* error = entries.check_starts(block.column, block.columns)) return error;
        return add(block, scratch) ? nullptr : OUTSIDE;
    }

   private:
    // Returns whether all columns are inside of the input.
    bool add(const Block<T>& block, float* x) const {
        if (block.rows > FEW_ROWS) return add_rows(block, x);
        bool inside = true;
        for (int64_t r = 0; r < block.rows; ++r) inside = inside && add_row(block, r, x);
        return inside;
    }

    bool add_row(const Block<T>& block, int64_t row, float* x) const {
        bool inside = true;
        widen(block.x.row(row), entries.in_size, x);
        for_groups(block.columns, LANES, [&](int64_t i, auto... n) {
            T* y = block.y.row(row) + block.column + i;
            Floats delta = {};
            inside &= sum_row(entries, block.column + i, min_of(LANES, n...), x, delta);
            store(y, load(y, n...) + block.weight * delta, n...);
        });
        return inside;
    }

    bool add_rows(const Block<T>& block, float* x) const {
        bool inside = true;
        transpose(block.x, block.rows, entries.in_size, {x, LANES});
        for_groups(block.columns, LANES, [&](int64_t i, auto... n) {
            Floats delta[LANES] = {};
            inside &= sum_rows(entries, block.column + i, min_of(LANES, n...), x, delta);
            transpose(delta);
            for (int64_t r = 0; r < block.rows; ++r) {
                T* y = block.y.row(r) + block.column + i;
                store(y, load(y, n...) + block.weight * delta[r], n...);
            }
        });
        return inside;
    }
};

}  // namespace

EXPORT_LINEAR(add_sparse_float32, Sparse, float, float)
EXPORT_LINEAR(add_sparse_bfloat16, Sparse, bfloat16, bfloat16)
