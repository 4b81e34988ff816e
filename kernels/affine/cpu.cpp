// correct_affine on the CPU. A unit of work is up to BLOCK_ROWS rows of one segment and one target:
//   shrink  h = w x A^T   (rows, rank) float32, stays in the cache,
//   expand  y = g y + h B + w c.
// In bfloat16 the matrix unit does both, where there is one.
#include "../cpu/expand.h"
#include "../cpu/products.h"
#include "../cpu/tables.h"
#include "matrix_tiles.h"

namespace {

constexpr int64_t UNIT_ROWS = 64;

template <class W>
int64_t scratch_of(const LowRank<W>& adapter) {
    return UNIT_ROWS * adapter.rank;
}

template <class T, class W>
void correct(const LowRank<W>& adapter, const Block<T>& block, float* scratch, Ahead) {
    const Matrix<float> h{scratch, adapter.rank};
    dots(block.x, block.rows, adapter.a, adapter.rank, adapter.ins, h);
    if (block.weight != 1.0f)
        for (int64_t i = 0; i < block.rows * adapter.rank; ++i) scratch[i] *= block.weight;
    const Expansion<W> expansion{adapter.b, adapter.rank, adapter.outs, adapter.bias, adapter.scale};
    expand(expansion, h, block.y, block.rows, block.weight);
}

#ifdef HAS_AMX

static_assert(UNIT_ROWS <= MatrixAffine::ROWS);

int64_t scratch_of(const LowRank<bfloat16>& adapter) {
    return matrix_unit() ? MatrixAffine::scratch(adapter) : scratch_of<bfloat16>(adapter);
}

void correct(const LowRank<bfloat16>& adapter, const Block<bfloat16>& block, float* scratch,
             Ahead next) {
    if (matrix_unit())
        MatrixAffine(adapter, scratch).correct(block.y, block.x, block.rows, block.weight, next);
    else
        correct<bfloat16, bfloat16>(adapter, block, scratch, next);
}

#endif

template <class T, class W>
struct Affine {
    static constexpr int64_t BLOCK_ROWS = UNIT_ROWS;

    LowRank<W> adapter;

    Affine(Cell<W>& cell, int64_t in_size, int64_t out_size) : adapter{cell[0], in_size, out_size} {
        if (adapter.rank) {
            adapter.a = cell.numbers(1, adapter.rank, in_size);
            adapter.b = cell.numbers(2, adapter.rank, out_size);
        }
        adapter.bias = cell.optional_numbers(3, out_size);
        adapter.scale = cell.optional_numbers(4, out_size);
    }

    int64_t columns() const { return adapter.outs; }
    int64_t block_columns() const { return adapter.outs; }  // of all columns, as they share h
    int64_t scratch() const { return scratch_of(adapter); }

    // What is read first.
    Ahead reads(const Block<T>&) const {
        return {adapter.a, min_of(TILE_OUTS, adapter.rank) * adapter.ins};
    }

    const char* compute(const Block<T>& block, float* scratch, Ahead next) const {
        correct(adapter, block, scratch, next);
        return nullptr;
    }
};

}  // namespace

EXPORT_LINEAR(correct_affine_float32, Affine, float, float)
EXPORT_LINEAR(correct_affine_bfloat16, Affine, bfloat16, bfloat16)
