// Sums over the rows of a sparse matrix S, for one row x, or for LANES of them that lie transposed, so
// that an entry is read once for all. Either way every sum has some parts, which take the entries of a
// row in turn and are added in one order: a row's result has the same bits in any company.
#pragma once

#include "../cpu/products.h"
#include "entries.h"

#ifdef MASKED_MEMORY

// For one row, sixteen entries at a time gather what they multiply, and each lane is a part.
constexpr int64_t AHEAD = 256;   // entries that are fetched before they are needed
constexpr int64_t FEW_ROWS = 3;  // reading entries again for each costs less than transposing these

// With a column of zeros behind those of the transposed rows.
INLINE int64_t sums_scratch(int64_t in_size) { return (in_size + 1) * LANES; }

// sums[k] = the sum over row o + k of S for k < count. Returns whether all columns are inside of the
// input; nothing is read by one that is not. Zero is added as sum_transposed may add some: it makes -0
// into 0.
template <class W>
INLINE bool sum_row(const Entries<W>& s, int64_t o, int64_t count, const float* x, Floats& sums) {
    const int32_t* starts = s.row_starts + o;
    Floats parts[LANES] = {};
    bool inside = true;
    for (int64_t k = 0; k < count; ++k) {
        const int32_t* at = s.columns + starts[k];
        const W* factors = s.values + starts[k];
        Floats acc = {};
        for_groups(starts[k + 1] - starts[k], LANES, [&](int64_t i, auto... n) {
            __builtin_prefetch(at + i + AHEAD);
            __builtin_prefetch(factors + i + AHEAD);
            inside &= add_gathered(acc, load(factors + i, n...), x, s.in_size, at + i, n...);
        });
        parts[k] = acc;
    }
    transpose(parts);
    sums = total(parts) + 0.0f;
    return inside;
}

// The sum over a row of S, for x (in + 1, LANES) whose last column is zero. Where a group of entries is
// not full, that is read; to tell the cases apart would cost more.
template <class W>
static Floats sum_transposed(const W* values, const int32_t* columns, int64_t count, const float* x,
                             int64_t in_size, bool& inside) {
    const __m512i zeros = _mm512_set1_epi32(static_cast<int32_t>(in_size));
    Floats parts[LANES] = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t n = min_of(LANES, count - i);
        const __m512i found = _mm512_mask_loadu_epi32(zeros, first_of(n), columns + i);
        const __mmask16 below = _mm512_cmplt_epu32_mask(found, zeros);
        inside &= below == first_of(n);
        const Words starts = (Words)_mm512_mask_mov_epi32(zeros, below, found) * LANES;
        alignas(4 * LANES) uint32_t start[LANES];
        alignas(4 * LANES) float factors[LANES];
        std::memcpy(start, &starts, sizeof start);
        store(factors, load(values + i, n));
        asm("" : "+m"(start), "+m"(factors));  // else GCC takes them from the vectors one by one
#pragma GCC unroll 16
        for (int p = 0; p < LANES; ++p) parts[p] += factors[p] * load(x + start[p]);
    }
    return total(parts) + 0.0f;
}

// The same for LANES rows, each lane of sums[k] being of one of them.
template <class W>
INLINE bool sum_rows(const Entries<W>& s, int64_t o, int64_t count, float* x, Floats (&sums)[LANES]) {
    const int32_t* starts = s.row_starts + o;
    bool inside = true;
    store(x + s.in_size * LANES, Floats{});
    for (int64_t k = 0; k < count; ++k)
        sums[k] = sum_transposed(s.values + starts[k], s.columns + starts[k],
                                 starts[k + 1] - starts[k], x, s.in_size, inside);
    return inside;
}

#else

constexpr int64_t FEW_ROWS = 1;  // see above
constexpr int PARTS = 4;  // hide the latency of an addition, and stay in registers

INLINE int64_t sums_scratch(int64_t in_size) { return in_size * LANES; }

INLINE float input_of(const float* x, int64_t column) { return x[column]; }

// LANES rows, given as (in, LANES)
struct Transposed {
    const float* x;
};
INLINE Floats input_of(Transposed rows, int64_t column) { return load(rows.x + column * LANES); }

template <class Input, class W>
INLINE auto weighted_sum(Input x, const W* values, const int32_t* columns, int64_t count) {
    decltype(input_of(x, 0)) parts[PARTS] = {};
    int64_t i = 0;
    for (; i + PARTS <= count; i += PARTS)
        for (int p = 0; p < PARTS; ++p)
            parts[p] = fused(to_float(values[i + p]), input_of(x, columns[i + p]), parts[p]);
    for (int p = 0; p < PARTS - 1; ++p)
        if (i + p < count)
            parts[p] = fused(to_float(values[i + p]), input_of(x, columns[i + p]), parts[p]);
    return total(parts);
}

template <class W, class Input, class Sums>
INLINE bool sum_each(const Entries<W>& s, int64_t o, int64_t count, Input x, Sums& sums) {
    const int32_t* starts = s.row_starts + o;
    if (!all_below(s.columns + starts[0], starts[count] - starts[0], s.in_size)) return false;
    for (int64_t k = 0; k < count; ++k)
        sums[k] = weighted_sum(x, s.values + starts[k], s.columns + starts[k],
                               starts[k + 1] - starts[k]);
    return true;
}

template <class W>
INLINE bool sum_row(const Entries<W>& s, int64_t o, int64_t count, const float* x, Floats& sums) {
    return sum_each(s, o, count, x, sums);
}

template <class W>
INLINE bool sum_rows(const Entries<W>& s, int64_t o, int64_t count, float* x, Floats (&sums)[LANES]) {
    return sum_each(s, o, count, Transposed{x}, sums);
}

#endif
