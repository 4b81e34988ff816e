// correct_affine on the CPU. A unit of work is up to BLOCK_ROWS rows of one segment and one target:
//   shrink  h = w x A^T   (rows, rank) float32, stays in the first cache level,
//   expand  y = g y + h B + w c.
#include "../cpu/expand.h"
#include "../cpu/products.h"
#include "../cpu/tables.h"

namespace {

template <class T, class W>
struct Affine {
    static constexpr int64_t BLOCK_ROWS = 32;

    int64_t rank, in_size, out_size;
    const W *a, *b, *bias, *scale;

    Affine(Cell<W>& cell, int64_t in_size, int64_t out_size)
        : rank(cell[0]), in_size(in_size), out_size(out_size),
          a(rank ? cell.numbers(1, rank, in_size) : nullptr),
          b(rank ? cell.numbers(2, rank, out_size) : nullptr),
          bias(cell.optional_numbers(3, out_size)), scale(cell.optional_numbers(4, out_size)) {}

    int64_t columns() const { return out_size; }
    int64_t block_columns() const { return out_size; }  // of all columns, as they share h
    int64_t scratch() const { return BLOCK_ROWS * rank; }

    const char* compute(const Block<T>& block, float* scratch) const {
        const Matrix<float> h{scratch, rank};
        dots(block.x, block.rows, a, rank, in_size, h);
        if (block.weight != 1.0f)
            for (int64_t i = 0; i < block.rows * rank; ++i) scratch[i] *= block.weight;
        const Expansion<W> expansion{b, rank, out_size, bias, scale};
        expand(expansion, h, block.y, block.rows, block.weight);
        return nullptr;
    }
};

}  // namespace

EXPORT_LINEAR(correct_affine_float32, Affine, float, float)
EXPORT_LINEAR(correct_affine_bfloat16, Affine, bfloat16, bfloat16)
