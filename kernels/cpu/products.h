// Products of a few rows with the rows of a matrix. Every (row, column) has one accumulator that runs
// over its sum in order, so a row's result has the same bits in any company.
#pragma once

#include "simd.h"
#include "tables.h"

// Register tiles: ROWS x COLS sums for blocks of rows, 1 x WIDE for single rows.
#ifdef __AVX512F__
constexpr int ROWS = 4, COLS = 4, WIDE = 8;
#else
constexpr int ROWS = 2, COLS = 2, WIDE = 4;
#endif

INLINE float to_float(float v) { return v; }

INLINE float to_float(bfloat16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float widened;
    std::memcpy(&widened, &bits, sizeof widened);
    return widened;
}

// a b + c, rounded once where the processor can. In a loop over single floats the compiler may else
// vectorise the products alone, and so round otherwise than in the same loop over vectors.
INLINE float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE Floats fused(float a, Floats b, Floats c) { return a * b + c; }

INLINE void from_float(float v, float* to) { *to = v; }

INLINE void from_float(float v, bfloat16* to) { store(to, splat(v), 1); }

template <int R, int C, class T>
INLINE void dot_tile(Matrix<const T> x, const T* a, int64_t size, Matrix<float> out) {
    using P = Pack<T>;
    Floats acc[R][C] = {};
    for_groups(size, P::SIZE, [&](int64_t k, auto... n) {
        P weights[C];
        for (int c = 0; c < C; ++c) weights[c] = load_pack(a + c * size + k, n...);
        for (int r = 0; r < R; ++r) {
            const P input = load_pack(x.row(r) + k, n...);
            for (int part = 0; part < P::PARTS; ++part)
                for (int c = 0; c < C; ++c) acc[r][c] += input.part[part] * weights[c].part[part];
        }
    });
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) out.row(r)[c] = sum(acc[r][c]);
}

// C rows of A stay in the first cache level while all rows of x pass.
template <int R, int C, class T>
void dot_columns(Matrix<const T> x, int64_t rows, const T* a, int64_t size, Matrix<float> out) {
    int64_t row = 0;
    for (; row + R <= rows; row += R) dot_tile<R, C>(x.from(row), a, size, out.from(row));
    for (; row < rows; ++row) dot_tile<1, C>(x.from(row), a, size, out.from(row));
}

template <int R, int C, class T>
void dot_all(Matrix<const T> x, int64_t rows, const T* a, int64_t count, int64_t size,
             Matrix<float> out) {
    int64_t i = 0;
    for (; i + C <= count; i += C) dot_columns<R, C>(x, rows, a + i * size, size, out.from(0, i));
    for (; i < count; ++i) dot_columns<R, 1>(x, rows, a + i * size, size, out.from(0, i));
}

// out (rows, count) = x A^T in float32, for x (rows, size) and a dense A (count, size).
template <class T>
void dots(Matrix<const T> x, int64_t rows, const T* a, int64_t count, int64_t size,
          Matrix<float> out) {
    if (rows < ROWS) dot_all<1, WIDE>(x, rows, a, count, size, out);
    else dot_all<ROWS, COLS>(x, rows, a, count, size, out);
}

// y (rows, columns) += w delta, rounded once.
template <class T>
void add_weighted(Matrix<T> y, Matrix<float> delta, int64_t rows, int64_t columns, float weight) {
    for (int64_t r = 0; r < rows; ++r)
        for_groups(columns, LANES, [&](int64_t i, auto... n) {
            const Floats sum = load(y.row(r) + i, n...) + weight * load(delta.row(r) + i, n...);
            store(y.row(r) + i, sum, n...);
        });
}

// ---- Matrices of floats whose rows are padded to whole vectors, in which they are read and written.
// What lies beyond a row's end goes into no result.

INLINE int64_t padded(int64_t size) { return div_up(size, LANES) * LANES; }

// out = x as floats, for dense x and out of this many elements
template <class T>
void widen(const T* x, int64_t size, float* out) {
    for_groups(size, LANES, [&](int64_t i, auto... n) { store(out + i, load(x + i, n...), n...); });
}

// out (columns, rows) = the transpose of x (rows, columns), as floats
template <class T>
void transpose(Matrix<const T> x, int64_t rows, int64_t columns, Matrix<float> out) {
    for (int64_t r = 0; r < rows; r += LANES)
        for_groups(columns, LANES, [&](int64_t i, auto... n) {
            Floats tile[LANES] = {};
            for (int64_t k = 0; k < min_of(LANES, rows - r); ++k)
                tile[k] = load(x.row(r + k) + i, n...);
            transpose(tile);
            for (int64_t k = 0; k < min_of(LANES, columns - i); ++k)
                store(out.row(i + k) + r, tile[k]);
        });
}

template <int R, int C>
INLINE void combine_tile(Matrix<const float> left, Matrix<const float> right, int64_t size,
                         Matrix<float> out) {
    Floats acc[R][C] = {};
    for (int64_t k = 0; k < size; ++k) {
        Floats factor[R];
        for (int r = 0; r < R; ++r) factor[r] = splat(left.row(r)[k]);
        for (int c = 0; c < C; ++c) {
            const Floats v = held(load(right.row(k) + c * LANES));
            for (int r = 0; r < R; ++r) acc[r][c] += factor[r] * v;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(out.row(r) + c * LANES, acc[r][c]);
}

template <int C>
INLINE void combine_columns(Matrix<const float> left, int64_t rows, Matrix<const float> right,
                            int64_t size, Matrix<float> out) {
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        combine_tile<ROWS, C>(left.from(row), right, size, out.from(row));
    for (; row < rows; ++row) combine_tile<1, C>(left.from(row), right, size, out.from(row));
}

// out (rows, columns) = left right, for left (rows, size) and right (size, columns), of which right
// and out are padded.
INLINE void combine(Matrix<const float> left, int64_t rows, Matrix<const float> right, int64_t size,
                    int64_t columns, Matrix<float> out) {
    int64_t i = 0;
    for (; i + COLS * LANES <= padded(columns); i += COLS * LANES)
        combine_columns<COLS>(left, rows, right.from(0, i), size, out.from(0, i));
    for (; i < columns; i += LANES)
        combine_columns<1>(left, rows, right.from(0, i), size, out.from(0, i));
}
