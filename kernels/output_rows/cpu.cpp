// replace_outputs on the CPU. A unit of work is BLOCK_COLUMNS of the replaced rows.
#include "../cpu/products.h"
#include "../cpu/tables.h"

namespace {

template <class T, class W>
struct OutputRows {
    static constexpr int64_t BLOCK_ROWS = 64, BLOCK_COLUMNS = 64;

    int64_t count, in_size, out_size;
    const int32_t* indices;
    const W* weight;

    OutputRows(Cell<W>& cell, int64_t in_size, int64_t out_size)
        : count(cell[0]), in_size(in_size), out_size(out_size), indices(cell.indices(1, count)),
          weight(cell.numbers(2, count, in_size)) {}

    int64_t columns() const { return count; }
    int64_t block_columns() const { return BLOCK_COLUMNS; }
    int64_t scratch() const { return BLOCK_ROWS * BLOCK_COLUMNS; }

    const char* compute(const Block<T>& block, float* scratch) const {
        const int32_t* columns = indices + block.column;
        if (!all_below(columns, block.columns, out_size))
            return "a replaced row lies outside the target";
        const Matrix<float> values{scratch, BLOCK_COLUMNS};
        const W* rows = weight + block.column * in_size;
        dots(block.x, block.rows, rows, block.columns, in_size, values);
        for (int64_t r = 0; r < block.rows; ++r)
            for (int64_t i = 0; i < block.columns; ++i)
                from_float(values.row(r)[i], block.y.row(r) + columns[i]);
        return nullptr;
    }
};

}  // namespace

EXPORT_LINEAR(replace_outputs_float32, OutputRows, float, float)
EXPORT_LINEAR(replace_outputs_bfloat16, OutputRows, bfloat16, bfloat16)
