// add_sparse on the CPU. A unit of work is up to LANES rows of one segment, transposed, so that each
// entry of S is read once and multiplies one vector of all rows; a row alone is left as it is. Every
// (row, column) has PARTS accumulators that take its entries in turn, in either case.
#include "../cpu/products.h"
#include "../cpu/tables.h"
#include "entries.h"

namespace {

constexpr int PARTS = 4;                     // hide the latency of an addition
constexpr int64_t BLOCK_ENTRIES = 1 << 14;  // of a unit, about: some microseconds of work

INLINE float input_of(const float* x, int64_t column) { return x[column]; }

// LANES rows, given as (in, LANES)
struct Transposed {
    const float* x;
};
INLINE Floats input_of(Transposed rows, int64_t column) { return load(rows.x + column * LANES); }

// The sum over a row of S, for one row x or for LANES of them.
template <class Input, class W>
INLINE auto row_sum(Input x, const W* values, const int32_t* columns, int64_t count) {
    decltype(input_of(x, 0)) acc[PARTS] = {};
    int64_t i = 0;
    for (; i + PARTS <= count; i += PARTS)
        for (int p = 0; p < PARTS; ++p)
            acc[p] = fused(to_float(values[i + p]), input_of(x, columns[i + p]), acc[p]);
    for (int p = 0; p < PARTS - 1; ++p)
        if (i + p < count)
            acc[p] = fused(to_float(values[i + p]), input_of(x, columns[i + p]), acc[p]);
    return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

template <class T, class W>
struct Sparse {
    static constexpr int64_t BLOCK_ROWS = LANES;

    Entries<W> entries;

    Sparse(Cell<W>& cell, int64_t in_size, int64_t out_size) : entries(cell, in_size, out_size) {}

    int64_t columns() const { return entries.out_size; }
    int64_t block_columns() const {
        return padded(max_of(1, columns() * BLOCK_ENTRIES / max_of(1, entries.count)));
    }
    int64_t scratch() const { return entries.in_size * LANES; }

    const char* compute(const Block<T>& block, float* scratch) const {
        if (const char* error = entries.check(block.column, block.columns)) return error;
        if (block.rows == 1) add_row(block, scratch);
        else add_rows(block, scratch);
        return nullptr;
    }

   private:
    template <class Input>
    auto sum_of(Input x, int64_t o) const {
        const int64_t first = entries.row_starts[o];
        return row_sum(x, entries.values + first, entries.columns + first,
                       entries.row_starts[o + 1] - first);
    }

    void add_row(const Block<T>& block, float* x) const {
        widen(block.x.data, entries.in_size, x);
        for_groups(block.columns, LANES, [&](int64_t i, auto... n) {
            Floats delta = {};
            T* y = block.y.data + block.column + i;
            for (int64_t k = 0; k < min_of(LANES, block.columns - i); ++k)
                delta[k] = sum_of<const float*>(x, block.column + i + k);
            store(y, load(y, n...) + block.weight * delta, n...);
        });
    }

    void add_rows(const Block<T>& block, float* x) const {
        transpose(block.x, block.rows, entries.in_size, {x, LANES});
        for_groups(block.columns, LANES, [&](int64_t i, auto... n) {
            Floats delta[LANES] = {};
            for (int64_t k = 0; k < min_of(LANES, block.columns - i); ++k)
                delta[k] = sum_of(Transposed{x}, block.column + i + k);
            transpose(delta);
            for (int64_t r = 0; r < block.rows; ++r) {
                T* y = block.y.row(r) + block.column + i;
                store(y, load(y, n...) + block.weight * delta[r], n...);
            }
        });
    }
};

}  // namespace

EXPORT_LINEAR(add_sparse_float32, Sparse, float, float)
EXPORT_LINEAR(add_sparse_bfloat16, Sparse, bfloat16, bfloat16)
