// Tiles of the matrix unit for factors of any size: how sizes are cut, and the second operands of
// products, whose rows are pairs, made of rows as they lie or of sums.
#pragma once

#include "../cpu/amx.h"
#include "../cpu/tables.h"

#ifdef HAS_AMX

// A size cut into tiles' rows: the last tile begins early rather than reach past the end.
struct CutRows {
    int64_t all, size;
    explicit CutRows(int64_t all) : all(all), size(div_up(all, div_up(all, TILE_ROWS))) {}
    int64_t start(int64_t row) const { return min_of(row, all - size); }
};

// A size that is summed over, cut into `count` tiles of one even size; zeros fill the last.
struct CutInner {
    int64_t all, count, size;
    explicit CutInner(int64_t all)
        : all(all), count(max_of(1, div_up(all, TILE_INS))), size(2 * div_up(all, 2 * count)) {}
    int64_t padded() const { return count * size; }
    bool fits() const { return padded() == all; }
};

struct alignas(64) TileMemory {
    uint8_t bytes[TILE_ROWS * TILE_BYTES];
    template <class E>
    E* row(int64_t i) {
        return reinterpret_cast<E*>(bytes + i * TILE_BYTES);
    }
};

constexpr int64_t CHUNK = TILE_INS / 4;  // of a row, what is turned at once

// to[w] (16) = word w of each row
template <class Load>
INLINE void turn_chunk(__m512i* to, Load load_row) {
    __m512i rows[4];  // 4 i + j in part i of the jth
    for (int j = 0; j < 4; ++j) {
        rows[j] = _mm512_castsi128_si512(load_row(j));
        rows[j] = _mm512_inserti32x4(rows[j], load_row(4 + j), 1);
        rows[j] = _mm512_inserti32x4(rows[j], load_row(8 + j), 2);
        rows[j] = _mm512_inserti32x4(rows[j], load_row(12 + j), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]);
    const __m512i b = _mm512_unpacklo_epi32(rows[2], rows[3]);
    const __m512i c = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    to[0] = _mm512_unpacklo_epi64(a, b);
    to[1] = _mm512_unpackhi_epi64(a, b);
    to[2] = _mm512_unpacklo_epi64(c, d);
    to[3] = _mm512_unpackhi_epi64(c, d);
}

// to (size / 2 pairs) = the transpose of from (rows, there), zeros past what is there
INLINE void turn(Matrix<const bfloat16> from, int64_t rows, int64_t size, int64_t there,
                 TileMemory& to) {
    const bfloat16* row[TILE_ROWS];
    for (int64_t r = 0; r < TILE_ROWS; ++r) row[r] = from.row(r < rows ? r : 0);
    for (int64_t c = 0; c < size; c += CHUNK) {
        const int64_t count = max_of(0, min_of(CHUNK, there - c));
        if (count == CHUNK)
            turn_chunk(to.row<__m512i>(c / 2), [&](int64_t r) {
                return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[r] + c));
            });
        else
            turn_chunk(to.row<__m512i>(c / 2), [&](int64_t r) {
                return _mm_maskz_loadu_epi16(static_cast<__mmask8>((1 << count) - 1), row[r] + c);
            });
    }
}

// The nearest bfloat16 as the upper half of a word; of a NaN anything, as what is left stays NaN.
INLINE Words nearest(Floats v) { return ((Words)v + 0x8000u) & 0xffff0000u; }

// Both as high + low, of which each word holds one of the first and one of the second.
INLINE void split(Floats first, Floats second, Words* high, Words* low) {
    const Words a = nearest(first), b = nearest(second);
    *high = a >> 16 | b;
    *low = (Words)(first - (Floats)a) >> 16 | ((Words)(second - (Floats)b) & 0xffff0000u);
}

#endif
