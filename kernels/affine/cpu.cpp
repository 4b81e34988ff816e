// correct_affine on the CPU. A unit of work is up to BLOCK_ROWS rows of one segment and one target:
//   shrink  h = w x A^T   (rows, rank) float32, stays in the first cache level,
//   expand  y = g y + h B + w c.
// Every (row, rank) and every (row, column) has one accumulator that runs over its sum in order, so
// a row's result has the same bits in a segment of one row and in one of a thousand.
#include "../cpu/products.h"
#include "../cpu/tables.h"

namespace {

// The output's side of one target; bias and scale may be null.
template <class T>
struct Expand {
    int64_t rank, out_size;
    const T *b, *bias, *scale;
};

// C packs of columns; n, where given, is how many columns there are of a single one. SCALED is known
// to the compiler, as most adapters have no g and even its branch would cost them some percents.
template <bool SCALED, int R, int C, class T, class... N>
INLINE void expand_tile(const Expand<T>& expand, Matrix<float> h, Matrix<T> y, int64_t column,
                        float weight, N... n) {
    using P = Pack<T>;
    P acc[R][C] = {};
    const T* b = expand.b + column;
    for (int64_t k = 0; k < expand.rank; ++k, b += expand.out_size) {
        P weights[C];
        for (int c = 0; c < C; ++c) weights[c] = load_pack(b + c * P::SIZE, n...);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c)
                for (int part = 0; part < P::PARTS; ++part)
                    acc[r][c].part[part] += h.row(r)[k] * weights[c].part[part];
    }
    for (int c = 0; c < C; ++c) {
        const int64_t at = column + c * P::SIZE;
        const P bias = expand.bias ? load_pack(expand.bias + at, n...) : P{};
        const P scale = SCALED ? load_pack(expand.scale + at, n...) : P{};
        for (int r = 0; r < R; ++r) {
            P sum = load_pack(y.row(r) + at, n...);
            for (int part = 0; part < P::PARTS; ++part) {
                // one product an addition: both orders of two would be as good, and round otherwise
                const Floats delta = acc[r][c].part[part] + weight * bias.part[part];
                if (SCALED) sum.part[part] = sum.part[part] * scale.part[part] + delta;
                else sum.part[part] += delta;
            }
            store_pack(y.row(r) + at, sum, n...);
        }
    }
}

// A strip of B's columns stays in the first cache level while all rows of the unit pass.
template <bool SCALED, int R, int C, class T, class... N>
INLINE void expand_columns(const Expand<T>& expand, Matrix<float> h, const Block<T>& block,
                           int64_t column, N... n) {
    int64_t row = 0;
    for (; row + R <= block.rows; row += R)
        expand_tile<SCALED, R, C>(expand, h.from(row), block.y.from(row), column, block.weight, n...);
    for (; row < block.rows; ++row)
        expand_tile<SCALED, 1, C>(expand, h.from(row), block.y.from(row), column, block.weight, n...);
}

template <bool SCALED, int R, int C, class T>
void expand_all(const Expand<T>& expand, Matrix<float> h, const Block<T>& block) {
    constexpr int PACKS = C / Pack<T>::PARTS;
    constexpr int64_t STRIP = PACKS * Pack<T>::SIZE;
    const int64_t strips = expand.out_size / STRIP * STRIP;
    for (int64_t column = 0; column < strips; column += STRIP)
        expand_columns<SCALED, R, PACKS>(expand, h, block, column);
    for_groups(expand.out_size - strips, Pack<T>::SIZE, [&](int64_t i, auto... n) {
        expand_columns<SCALED, R, 1>(expand, h, block, strips + i, n...);
    });
}

template <class T, class W>
struct Affine {
    static constexpr int64_t BLOCK_ROWS = 32;

    int64_t in_size;
    const W* a;
    Expand<W> expand;

    Affine(Cell<W>& cell, int64_t in_size, int64_t out_size)
        : in_size(in_size),
          a(cell[0] ? cell.numbers(1, cell[0], in_size) : nullptr),
          expand{cell[0], out_size, cell[0] ? cell.numbers(2, cell[0], out_size) : nullptr,
                 cell.optional_numbers(3, out_size), cell.optional_numbers(4, out_size)} {}

    int64_t columns() const { return expand.out_size; }
    int64_t block_columns() const { return expand.out_size; }
    int64_t scratch() const { return BLOCK_ROWS * expand.rank; }

    const char* compute(const Block<T>& block, float* scratch) const {
        const Matrix<float> h{scratch, expand.rank};
        dots(block.x, block.rows, a, expand.rank, in_size, h);
        if (block.weight != 1.0f)
            for (int64_t i = 0; i < block.rows * expand.rank; ++i) scratch[i] *= block.weight;
        if (expand.scale) expand_rows<true>(h, block);
        else expand_rows<false>(h, block);
        return nullptr;
    }

   private:
    template <bool SCALED>
    void expand_rows(Matrix<float> h, const Block<T>& block) const {
        if (block.rows < ROWS) expand_all<SCALED, 1, WIDE>(expand, h, block);
        else expand_all<SCALED, ROWS, COLS>(expand, h, block);
    }
};

}  // namespace

EXPORT_LINEAR(correct_affine_float32, Affine, float, float)
EXPORT_LINEAR(correct_affine_bfloat16, Affine, bfloat16, bfloat16)
