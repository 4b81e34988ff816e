// Vectors of W = 4, 8 or 16 floats, one for each of as many rows that stand side by side, and how rows
// come to stand so. Each is as wide as it has rows: a vector stored in part is not passed on to a load
// of the same part, which then waits for the cache, and that is what sums of entries do all the time.
#pragma once

#include "../cpu/simd.h"

template <int W>
struct VectorOf {
    typedef float type __attribute__((vector_size(4 * W)));
};
template <int W>
using Vector = typename VectorOf<W>::type;

template <int W>
INLINE Vector<W> load_lanes(const float* p) {
    Vector<W> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class T, class V>
INLINE void store_lanes(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

// columns[c][r] = rows[r][c]
template <int W>
INLINE void to_columns(const Floats (&rows)[W], Vector<W> (&columns)[LANES]) {
    for (int c = 0; c < LANES; ++c)
        for (int r = 0; r < W; ++r) columns[c][r] = rows[r][c];
}

// rows[r][c] = columns[c][r]
template <int W>
INLINE void to_rows(const Vector<W> (&columns)[LANES], Floats (&rows)[W]) {
    for (int c = 0; c < LANES; ++c)
        for (int r = 0; r < W; ++r) rows[r][c] = columns[c][r];
}

template <>
INLINE_MEMBER void to_columns<16>(const Floats (&rows)[16], Floats (&columns)[LANES]) {
    for (int r = 0; r < 16; ++r) columns[r] = rows[r];
    transpose(columns);
}

template <>
INLINE_MEMBER void to_rows<16>(const Floats (&columns)[LANES], Floats (&rows)[16]) {
    to_columns<16>(columns, rows);
}

// columns[c] = rows[..][c], twice
template <int W>
INLINE void to_column_pairs(const Floats (&rows)[W], Vector<2 * W> (&columns)[LANES]) {
    for (int c = 0; c < LANES; ++c)
        for (int r = 0; r < 2 * W; ++r) columns[c][r] = rows[r % W][c];
}

// ---- N vectors of W lanes as one.

template <int W, int N>
INLINE Vector<N * W> load_parts(const float* p, int64_t) {
    static_assert(N == 1);
    return load_lanes<W>(p);
}

template <int W, int N>
INLINE void store_parts(float* p, int64_t, Vector<N * W> v) {
    static_assert(N == 1);
    store_lanes(p, v);
}

#ifdef __AVX512F__
// Of four rows, in each 128 bits: four columns' numbers <-> four rows' numbers. out[k] holds columns k,
// k + 4, k + 8 and k + 12.
INLINE void transpose_quads(__m512 a, __m512 b, __m512 c, __m512 d, __m512d out[4]) {
    const __m512d low_ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
    const __m512d low_cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    const __m512d high_ab = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d high_cd = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    out[0] = _mm512_unpacklo_pd(low_ab, low_cd);
    out[1] = _mm512_unpackhi_pd(low_ab, low_cd);
    out[2] = _mm512_unpacklo_pd(high_ab, high_cd);
    out[3] = _mm512_unpackhi_pd(high_ab, high_cd);
}

template <>
INLINE_MEMBER void to_columns<4>(const Floats (&rows)[4], Vector<4> (&columns)[LANES]) {
    __m512d quads[4];
    transpose_quads((__m512)rows[0], (__m512)rows[1], (__m512)rows[2], (__m512)rows[3], quads);
    for (int k = 0; k < 4; ++k) {
        const __m512 v = _mm512_castpd_ps(quads[k]);
        columns[k] = (Vector<4>)_mm512_castps512_ps128(v);
        columns[k + 4] = (Vector<4>)_mm512_extractf32x4_ps(v, 1);
        columns[k + 8] = (Vector<4>)_mm512_extractf32x4_ps(v, 2);
        columns[k + 12] = (Vector<4>)_mm512_extractf32x4_ps(v, 3);
    }
}

template <>
INLINE_MEMBER void to_rows<4>(const Vector<4> (&columns)[LANES], Floats (&rows)[4]) {
    __m512 v[4];
    for (int k = 0; k < 4; ++k) {
        v[k] = _mm512_castps128_ps512((__m128)columns[k]);
        v[k] = _mm512_insertf32x4(v[k], (__m128)columns[k + 4], 1);
        v[k] = _mm512_insertf32x4(v[k], (__m128)columns[k + 8], 2);
        v[k] = _mm512_insertf32x4(v[k], (__m128)columns[k + 12], 3);
    }
    __m512d quads[4];
    transpose_quads(v[0], v[1], v[2], v[3], quads);
    for (int r = 0; r < 4; ++r) rows[r] = (Floats)quads[r];
}

template <>
INLINE_MEMBER void to_columns<8>(const Floats (&rows)[8], Vector<8> (&columns)[LANES]) {
    __m512d upper[4], lower[4];
    const auto row = [&](int r) { return (__m512)rows[r]; };
    transpose_quads(row(0), row(1), row(2), row(3), upper);
    transpose_quads(row(4), row(5), row(6), row(7), lower);
    const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    const __m512i second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    for (int k = 0; k < 4; ++k) {
        const __m512d near = _mm512_permutex2var_pd(upper[k], first, lower[k]);
        const __m512d far = _mm512_permutex2var_pd(upper[k], second, lower[k]);
        columns[k] = (Vector<8>)_mm512_castpd512_pd256(near);
        columns[k + 4] = (Vector<8>)_mm512_extractf64x4_pd(near, 1);
        columns[k + 8] = (Vector<8>)_mm512_castpd512_pd256(far);
        columns[k + 12] = (Vector<8>)_mm512_extractf64x4_pd(far, 1);
    }
}

template <>
INLINE_MEMBER void to_rows<8>(const Vector<8> (&columns)[LANES], Floats (&rows)[8]) {
    const auto pair = [&](int c) {
        const __m512d v = _mm512_castpd256_pd512((__m256d)columns[c]);
        return _mm512_insertf64x4(v, (__m256d)columns[c + 4], 1);
    };
    const __m512i first = _mm512_set_epi64(13, 12, 9, 8, 5, 4, 1, 0);
    const __m512i second = _mm512_set_epi64(15, 14, 11, 10, 7, 6, 3, 2);
    __m512 upper[4], lower[4];
    for (int k = 0; k < 4; ++k) {
        const __m512d near = pair(k), far = pair(k + 8);
        upper[k] = _mm512_castpd_ps(_mm512_permutex2var_pd(near, first, far));
        lower[k] = _mm512_castpd_ps(_mm512_permutex2var_pd(near, second, far));
    }
    __m512d quads[4];
    transpose_quads(upper[0], upper[1], upper[2], upper[3], quads);
    for (int r = 0; r < 4; ++r) rows[r] = (Floats)quads[r];
    transpose_quads(lower[0], lower[1], lower[2], lower[3], quads);
    for (int r = 0; r < 4; ++r) rows[r + 4] = (Floats)quads[r];
}

template <>
INLINE_MEMBER void to_column_pairs<4>(const Floats (&rows)[4], Vector<8> (&columns)[LANES]) {
    __m512d quads[4];
    transpose_quads((__m512)rows[0], (__m512)rows[1], (__m512)rows[2], (__m512)rows[3], quads);
    const auto pair = [](__m512d v) { return (Vector<8>)_mm512_castpd512_pd256(v); };
    for (int k = 0; k < 4; ++k) {
        columns[k] = pair(_mm512_shuffle_f64x2(quads[k], quads[k], 0x00));
        columns[k + 4] = pair(_mm512_shuffle_f64x2(quads[k], quads[k], 0x55));
        columns[k + 8] = pair(_mm512_shuffle_f64x2(quads[k], quads[k], 0xaa));
        columns[k + 12] = pair(_mm512_shuffle_f64x2(quads[k], quads[k], 0xff));
    }
}

template <>
INLINE_MEMBER void to_column_pairs<8>(const Floats (&rows)[8], Floats (&columns)[LANES]) {
    __m512d upper[4], lower[4];
    const auto row = [&](int r) { return (__m512)rows[r]; };
    transpose_quads(row(0), row(1), row(2), row(3), upper);
    transpose_quads(row(4), row(5), row(6), row(7), lower);
    for (int j = 0; j < 4; ++j) {
        const int64_t a = 2 * j, b = a + 8;
        const __m512i twice = _mm512_set_epi64(b + 1, b, a + 1, a, b + 1, b, a + 1, a);
        for (int k = 0; k < 4; ++k)
            columns[k + 4 * j] = (Floats)_mm512_permutex2var_pd(upper[k], twice, lower[k]);
    }
}

template <>
INLINE_MEMBER Floats load_parts<8, 2>(const float* p, int64_t step) {
    const auto part = [&](int64_t i) { return (__m256d)load_lanes<8>(p + i * step); };
    return (Floats)_mm512_insertf64x4(_mm512_castpd256_pd512(part(0)), part(1), 1);
}

template <>
INLINE_MEMBER void store_parts<8, 2>(float* p, int64_t step, Floats v) {
    store_lanes(p, _mm512_castpd512_pd256((__m512d)v));
    store_lanes(p + step, _mm512_extractf64x4_pd((__m512d)v, 1));
}

template <>
INLINE_MEMBER Floats load_parts<4, 4>(const float* p, int64_t step) {
    const auto part = [&](int64_t i) { return (__m128)load_lanes<4>(p + i * step); };
    __m512 v = _mm512_castps128_ps512(part(0));
    v = _mm512_insertf32x4(v, part(1), 1);
    v = _mm512_insertf32x4(v, part(2), 2);
    return (Floats)_mm512_insertf32x4(v, part(3), 3);
}

template <>
INLINE_MEMBER void store_parts<4, 4>(float* p, int64_t step, Floats v) {
    store_lanes(p, _mm512_castps512_ps128((__m512)v));
    store_lanes(p + step, _mm512_extractf32x4_ps((__m512)v, 1));
    store_lanes(p + 2 * step, _mm512_extractf32x4_ps((__m512)v, 2));
    store_lanes(p + 3 * step, _mm512_extractf32x4_ps((__m512)v, 3));
}
#endif

// W lanes of each of the numbers
template <int W>
INLINE Floats spread(const float* numbers, int64_t step) {
#ifdef __AVX512F__
    __m512 v = _mm512_set1_ps(*numbers);
    for (int64_t i = 1; i < LANES / W; ++i) {
        const __m128 number = _mm_load_ss(numbers + i * step);
        v = _mm512_mask_broadcastss_ps(v, ((1 << W) - 1) << (i * W), number);
    }
    return (Floats)v;
#else
    Floats v;
    for (int64_t i = 0; i < LANES; ++i) v[i] = numbers[i / W * step];
    return v;
#endif
}

// Vectors of W lanes that are best computed at once.
#ifdef __AVX512F__
template <int W>
constexpr int TOGETHER = LANES / W;
#else
template <int W>
constexpr int TOGETHER = 1;
#endif
