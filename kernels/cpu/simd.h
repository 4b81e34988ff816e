// Sixteen float lanes in plain GCC/Clang vector types: the compiler maps them to one AVX-512 register,
// two AVX ones, or four of SSE or NEON. Every kernel accumulates in these lanes, in float32.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define MASKED_MEMORY  // loads and stores of some elements of a vector
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

constexpr int64_t LANES = 16;

using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));

struct bfloat16 {
    uint16_t bits;
};

INLINE int64_t min_of(int64_t a) { return a; }
INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- LANES elements in their order; with n < LANES, only n are touched and the others read as zero

INLINE Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE Floats widened(Halves v) {
#ifdef __AVX512F__
    // GCC 12 makes five instructions of the conversion below.
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
#else
    return (Floats)(__builtin_convertvector(v, Words) << 16);
#endif
}

INLINE Floats load(const bfloat16* p) {
    Halves v;
    std::memcpy(&v, p, sizeof v);
    return widened(v);
}

// To the nearest bfloat16, ties to even; NaN stays NaN. Intel's instruction makes numbers below the
// smallest normal one zero.
#ifdef __AVX512BF16__
INLINE Halves rounded(Floats v) { return (Halves)_mm512_cvtneps_pbh((__m512)v); }
#else
INLINE Halves rounded(Floats v) {
    const Words bits = (Words)v;
    const Words is_nan = (Words)(v != v);
    const Words nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector((nearest & ~is_nan) | (is_nan & 0x7fc0u), Halves);
}
#endif

INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

INLINE void store(bfloat16* p, Floats v) {
    const Halves halves = rounded(v);
    std::memcpy(p, &halves, sizeof halves);
}

#ifdef MASKED_MEMORY
INLINE __mmask16 first_of(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

INLINE Floats load(const float* p, int64_t n) { return (Floats)_mm512_maskz_loadu_ps(first_of(n), p); }

INLINE Floats load(const bfloat16* p, int64_t n) {
    return widened((Halves)_mm256_maskz_loadu_epi16(first_of(n), p));
}

INLINE void store(float* p, Floats v, int64_t n) {
    _mm512_mask_storeu_ps(p, first_of(n), (__m512)v);
}

INLINE void store(bfloat16* p, Floats v, int64_t n) {
    _mm256_mask_storeu_epi16(p, first_of(n), (__m256i)rounded(v));
}
#else
template <class T>
INLINE Floats load(const T* p, int64_t n) {
    T padded[LANES] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
}

template <class T>
INLINE void store(T* p, Floats v, int64_t n) {
    T padded[LANES];
    store(padded, v);
    std::memcpy(p, padded, n * sizeof(T));
}
#endif

// Calls body(i) for every full group of `width` elements and body(i, n) for the n that are left, so
// that a body `[](int64_t i, auto... n)` compiles once for each.
template <class Body>
INLINE void for_groups(int64_t size, int64_t width, Body body) {
    int64_t i = 0;
    for (; i + width <= size; i += width) body(i);
    if (i < size) body(i, size - i);
}

// ---- 64 bytes of T as float32. Two bfloat16 share each 32-bit lane: the even elements come out as
// one part and the odd ones as another, by a shift and a mask alone. Sums do not mind the order, and
// storing reverses it.

template <class T>
struct Pack {
    static constexpr int PARTS = sizeof(float) / sizeof(T);
    static constexpr int64_t SIZE = LANES * PARTS;
    Floats part[PARTS];
};

INLINE Pack<bfloat16> unpacked(Words v) {
    return {{(Floats)(v << 16), (Floats)(v & 0xffff0000u)}};
}

INLINE Words packed(Pack<bfloat16> pack) {
    return __builtin_convertvector(rounded(pack.part[0]), Words) |
           __builtin_convertvector(rounded(pack.part[1]), Words) << 16;
}

INLINE Pack<float> load_pack(const float* p) { return {{load(p)}}; }

INLINE Pack<bfloat16> load_pack(const bfloat16* p) {
    Words v;
    std::memcpy(&v, p, sizeof v);
    return unpacked(v);
}

INLINE void store_pack(float* p, Pack<float> pack) { store(p, pack.part[0]); }

INLINE void store_pack(bfloat16* p, Pack<bfloat16> pack) {
    const Words v = packed(pack);
    std::memcpy(p, &v, sizeof v);
}

#ifdef MASKED_MEMORY
INLINE Pack<float> load_pack(const float* p, int64_t n) { return {{load(p, n)}}; }

INLINE Pack<bfloat16> load_pack(const bfloat16* p, int64_t n) {
    return unpacked((Words)_mm512_maskz_loadu_epi16((1u << n) - 1, p));
}

INLINE void store_pack(float* p, Pack<float> pack, int64_t n) { store(p, pack.part[0], n); }

INLINE void store_pack(bfloat16* p, Pack<bfloat16> pack, int64_t n) {
    _mm512_mask_storeu_epi16(p, (1u << n) - 1, (__m512i)packed(pack));
}
#else
template <class T>
INLINE Pack<T> load_pack(const T* p, int64_t n) {
    T padded[Pack<T>::SIZE] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load_pack(padded);
}

template <class T>
INLINE void store_pack(T* p, Pack<T> pack, int64_t n) {
    T padded[Pack<T>::SIZE];
    store_pack(padded, pack);
    std::memcpy(p, padded, n * sizeof(T));
}
#endif

// ---- gathered

#ifdef MASKED_MEMORY
// sum += factors x[indices] for LANES indices, or for n of them. A lane whose index is not in
// 0 .. size - 1 reads nothing and stays as it is. Returns whether there was none.
template <class... N>
INLINE bool add_gathered(Floats& sum, Floats factors, const float* x, int64_t size,
                         const int32_t* indices, N... n) {
    const __mmask16 wanted = first_of(min_of(LANES, n...));
    const __m512i at = _mm512_maskz_loadu_epi32(wanted, indices);
    const __m512i bound = _mm512_set1_epi32(static_cast<int32_t>(min_of(size, INT32_MAX)));
    const __mmask16 inside = _mm512_mask_cmplt_epu32_mask(wanted, at, bound);
    const __m512 found = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, at, x, sizeof(float));
    sum = (Floats)_mm512_mask3_fmadd_ps((__m512)factors, found, (__m512)sum, inside);
    return inside == wanted;
}
#endif

// ---- across lanes

// x - 0 is x for every x, unlike x + 0, so that no subtraction is left.
INLINE Floats splat(float x) { return x - Floats{}; }

// The same value, in a register: GCC would read memory again for each use of what it has loaded.
INLINE Floats held(Floats v) {
#ifdef __AVX512F__
    asm("" : "+v"(v));
#endif
    return v;
}

INLINE Floats maximum(Floats a, Floats b) {
    const Ints greater = a > b;
    return (Floats)(((Ints)a & greater) | ((Ints)b & ~greater));
}

#ifdef __AVX512F__
INLINE float sum(Floats v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float maximum(Floats v) { return _mm512_reduce_max_ps((__m512)v); }
#else
INLINE float sum(Floats v) {
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
}

INLINE float maximum(Floats v) {
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
    return v[0];
}
#endif

// The sum of all parts, in the order in which sum() adds the lanes of a vector.
template <int COUNT, class Part>
INLINE Part total(const Part (&parts)[COUNT]) {
    if constexpr (COUNT == 1) return parts[0];
    else {
        Part halves[COUNT / 2];
#pragma GCC unroll 8
        for (int p = 0; p < COUNT / 2; ++p) halves[p] = parts[p] + parts[p + COUNT / 2];
        return total(halves);
    }
}

// exp(x) for x <= 0 within 2 units in the last place; 0 below -87, NaN for NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2, and exp(r) by its Taylor polynomial of degree 7.
INLINE Floats exp_nonpositive(Floats x) {
#ifdef __AVX512F__
    const Floats n = (Floats)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
#else
    const Floats shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats shifted = x * 1.44269504f + shifter, n = shifted - shifter;
#endif
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#ifdef __AVX512F__
    const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    return (Floats)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)n);
#else
    const Ints keep = ~(x < -87.0f);
    const Floats power = (Floats)((((Ints)shifted - (Ints)shifter) + 127) << 23);
    return (Floats)((Ints)(p * power) & keep);
#endif
}

// rows[i][j] <-> rows[j][i]
INLINE void transpose(Floats rows[LANES]) {
#ifdef __AVX512F__
    __m512 t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; ++k) {
            const __m512d a = _mm512_castps_pd(t[i + k]), b = _mm512_castps_pd(t[i + k + 2]);
            u[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            u[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int k = 0; k < 4; ++k) {  // u[4 q + k]: columns k, k + 4, k + 8, k + 12 of rows 4 q .. 4 q + 3
        const __m512 a = _mm512_shuffle_f32x4(u[k], u[4 + k], 0x88);
        const __m512 b = _mm512_shuffle_f32x4(u[k], u[4 + k], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(u[8 + k], u[12 + k], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(u[8 + k], u[12 + k], 0xdd);
        rows[k] = (Floats)_mm512_shuffle_f32x4(a, c, 0x88);
        rows[k + 4] = (Floats)_mm512_shuffle_f32x4(b, d, 0x88);
        rows[k + 8] = (Floats)_mm512_shuffle_f32x4(a, c, 0xdd);
        rows[k + 12] = (Floats)_mm512_shuffle_f32x4(b, d, 0xdd);
    }
#else
    for (int64_t i = 0; i < LANES; ++i)
        for (int64_t j = 0; j < i; ++j) {
            const float swapped = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = swapped;
        }
#endif
}
