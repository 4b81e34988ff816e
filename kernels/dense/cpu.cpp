// add_dense on the CPU. A unit of work is BLOCK_COLUMNS rows of D, which stay in the second cache level
// while the units of other rows of the batch read them again.
#include "../cpu/products.h"
#include "../cpu/tables.h"

namespace {

template <class T, class W>
struct Dense {
    static constexpr int64_t BLOCK_ROWS = 64, BLOCK_COLUMNS = 64;

    int64_t in_size, out_size;
    const W* weight;

    Dense(Cell<W>& cell, int64_t in_size, int64_t out_size)
        : in_size(in_size), out_size(out_size), weight(cell.numbers(0, out_size, in_size)) {}

    int64_t columns() const { return out_size; }
    int64_t block_columns() const { return BLOCK_COLUMNS; }
    int64_t scratch() const { return BLOCK_ROWS * BLOCK_COLUMNS; }

    const char* compute(const Block<T>& block, float* scratch) const {
        const Matrix<float> delta{scratch, BLOCK_COLUMNS};
        const W* rows = weight + block.column * in_size;
        dots(block.x, block.rows, rows, block.columns, in_size, delta);
        add_weighted(block.y.from(0, block.column), delta, block.rows, block.columns, block.weight);
        return nullptr;
    }
};

}  // namespace

EXPORT_LINEAR(add_dense_float32, Dense, float, float)
EXPORT_LINEAR(add_dense_bfloat16, Dense, bfloat16, bfloat16)
