// y = g y + h B + w c for a few rows: the second half of every low-rank correction, and the sum of an
// attention's values. Every (row, column) has one accumulator that runs over its sum in order, so a
// row's result has the same bits in any company.
#pragma once

#include "products.h"
#include "simd.h"
#include "tables.h"

// B (count, size), c and g (size,); c and g may be null.
template <class T>
struct Expansion {
    const T* b;
    int64_t count, size;
    const T *bias, *scale;
};

// C packs of columns; n, where given, is how many columns there are of a single one. SCALED, whether
// there is a g, is known to the compiler: most adapters have none and would pay for the branch.
template <bool SCALED, int R, int C, class T, class... N>
INLINE void expand_tile(const Expansion<T>& e, Matrix<float> h, Matrix<T> y, int64_t column,
                        float weight, N... n) {
    using P = Pack<T>;
    P acc[R][C] = {};
    const T* b = e.b + column;
    for (int64_t k = 0; k < e.count; ++k, b += e.size) {
        P values[C];
        for (int c = 0; c < C; ++c) values[c] = load_pack(b + c * P::SIZE, n...);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c)
                for (int part = 0; part < P::PARTS; ++part)
                    acc[r][c].part[part] += h.row(r)[k] * values[c].part[part];
    }
    for (int c = 0; c < C; ++c) {
        const int64_t at = column + c * P::SIZE;
        const P bias = e.bias ? load_pack(e.bias + at, n...) : P{};
        const P scale = SCALED ? load_pack(e.scale + at, n...) : P{};
        for (int r = 0; r < R; ++r) {
            P sum = load_pack(y.row(r) + at, n...);
            for (int part = 0; part < P::PARTS; ++part) {
                // one product a sum: of two, the compiler could fuse either, and round otherwise
                const Floats delta = acc[r][c].part[part] + weight * bias.part[part];
                if (SCALED) sum.part[part] = sum.part[part] * scale.part[part] + delta;
                else sum.part[part] += delta;
            }
            store_pack(y.row(r) + at, sum, n...);
        }
    }
}

// A strip of B's columns stays in the first cache level while all rows pass.
template <bool SCALED, int R, int C, class T, class... N>
INLINE void expand_columns(const Expansion<T>& e, Matrix<float> h, Matrix<T> y, int64_t rows,
                           int64_t column, float weight, N... n) {
    int64_t row = 0;
    for (; row + R <= rows; row += R)
        expand_tile<SCALED, R, C>(e, h.from(row), y.from(row), column, weight, n...);
    for (; row < rows; ++row)
        expand_tile<SCALED, 1, C>(e, h.from(row), y.from(row), column, weight, n...);
}

template <bool SCALED, int R, int C, class T>
static void expand_all(const Expansion<T>& e, Matrix<float> h, Matrix<T> y, int64_t rows,
                       float weight) {
    constexpr int PACKS = C / Pack<T>::PARTS;
    constexpr int64_t STRIP = PACKS * Pack<T>::SIZE;
    const int64_t strips = e.size / STRIP * STRIP;
    for (int64_t column = 0; column < strips; column += STRIP)
        expand_columns<SCALED, R, PACKS>(e, h, y, rows, column, weight);
    for_groups(e.size - strips, Pack<T>::SIZE, [&](int64_t i, auto... n) {
        expand_columns<SCALED, R, 1>(e, h, y, rows, strips + i, weight, n...);
    });
}

// expand, where it is known to the compiler whether there is a g.
template <bool SCALED, class T>
static void expand_rows(const Expansion<T>& e, Matrix<float> h, Matrix<T> y, int64_t rows,
                        float weight) {
    if (rows < ROWS) expand_all<SCALED, 1, WIDE>(e, h, y, rows, weight);
    else expand_all<SCALED, ROWS, COLS>(e, h, y, rows, weight);
}

// y (rows, size) = g y + h B + weight c, in float32 and rounded once; h is (rows, count).
template <class T>
static void expand(const Expansion<T>& e, Matrix<float> h, Matrix<T> y, int64_t rows, float weight) {
    if (e.scale) expand_rows<true>(e, h, y, rows, weight);
    else expand_rows<false>(e, h, y, rows, weight);
}
