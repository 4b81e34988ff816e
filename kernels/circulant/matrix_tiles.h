// add_circulant in bfloat16 on the processor's matrix unit. For one row of x,
//   Y[m, p] = sum_n sum_d K[m, n, d] X_n[d, p],  X_n[d, p] = x_n[(p + d) mod b],
// is a product of matrices. A tile of K is sixteen of its rows m as they lie. X_n is constant along
// its antidiagonals: with pairs[j] = (x_n[j mod b], x_n[(j + 1) mod b]), the tile of it that begins at
// (d, p) has pairs[d + p + 2 i + j] in its row i and column j, two rows of X_n being one of the tile.
// So X_n has b / 16 different tiles, and the second half of each is the first half of the next. These
// halves are written once for a row of x, and every product finds its tile where two of them lie.
// (A tile could be loaded from `pairs` itself, but rows across two cache lines take six times as long.)
// Every Y[m, p] runs over n and d in one order, so a row's result has the same bits in any company.
#pragma once

#include "../cpu/amx.h"
#include "../cpu/products.h"
#include "../cpu/tables.h"

// K (out / b, in / b, b)
template <class W>
struct CirculantKernel {
    int64_t b, in_size;
    const W* numbers;

    // The rows for the block of y that begins at this column and those behind it.
    const W* rows(int64_t column) const { return numbers + column / b * in_size; }
};

#ifdef HAS_AMX

class MatrixCirculant {
    static constexpr int64_t STRIP = 4;  // tiles of sums at once
    static constexpr int64_t CHUNK_INS = 640;
    static constexpr int64_t HALF = TILE_INS / 4;  // rows of half a tile

    const CirculantKernel<bfloat16>& kernel;
    const int64_t b, in_size;
    float* sums;    // (BLOCKS, b)
    Words* halves;  // (chunk, b / 16 + 1, HALF): of X_n's tiles, the first once more behind the last
    Ahead ahead;

  public:
    static constexpr int64_t BLOCKS = TILE_ROWS;  // of y at once, at most

    // Whether the tiles fit these blocks.
    static bool fits(const CirculantKernel<bfloat16>& kernel) { return kernel.b % TILE_INS == 0; }

    // Floats of memory that it needs.
    static int64_t scratch(const CirculantKernel<bfloat16>& kernel) {
        const int64_t b = kernel.b;
        return BLOCKS * b + chunk_of(b) * halves_of(b) * HALF * LANES;
    }

    MatrixCirculant(const CirculantKernel<bfloat16>& kernel, float* scratch, Ahead ahead)
        : kernel(kernel), b(kernel.b), in_size(kernel.in_size), sums(scratch),
          halves(reinterpret_cast<Words*>(sums + BLOCKS * b)), ahead(ahead) {}

    void correct(const Block<bfloat16>& block) {
        const int64_t blocks = block.columns / b;
        TileConfig config;  // 0 .. 3 are sums, 4 is of K, 5 .. 7 are of X
        for (int tile = 0; tile <= STRIP; ++tile) config.shape(tile, blocks, TILE_BYTES);
        const TilesInUse in_use(config);
        const bfloat16* rows = kernel.rows(block.column);
        for (int64_t r = 0; r < block.rows; ++r) {
            correlate(block.x.row(r), rows);
            add_weighted<bfloat16>({block.y.row(r) + block.column, b}, {sums, b}, blocks, b,
                                   block.weight);
        }
    }

  private:
    static int64_t halves_of(int64_t b) { return b / TILE_OUTS + 1; }

    // How many X_n there are tiles of at once: they stay in the first cache level.
    static int64_t chunk_of(int64_t b) { return max_of(1, CHUNK_INS / b); }

    // sums (blocks, b) of a row x, from `rows` of K
    void correlate(const bfloat16* x, const bfloat16* rows) {
        const int64_t step = chunk_of(b) * b;
        for (int64_t in = 0; in < in_size; in += step) {
            const int64_t count = min_of(step, in_size - in);
            write_halves(x + in, count);
            int64_t p = 0;
            for (; p + STRIP * TILE_OUTS <= b; p += STRIP * TILE_OUTS)
                multiply<true>(rows + in, count, p, in == 0);
            for (; p < b; p += 2 * TILE_OUTS) multiply<false>(rows + in, count, p, in == 0);
        }
    }

    void write_halves(const bfloat16* x, int64_t count) const {
        Words* to = halves;
        for (int64_t n = 0; n < count; n += b, x += b) {
            const Words first = pairs(x, 0);
            Words from = first;
            for (int64_t i = LANES; i <= b; i += LANES, to += HALF) {
                const Words next = i < b ? pairs(x, i) : first;
                write_half(from, next, to);
                from = next;
            }
            std::memcpy(to, to - b / LANES * HALF, HALF * sizeof(Words));
            to += HALF;
        }
    }

    // pairs[i .. i + 15] of one x_n
    Words pairs(const bfloat16* x, int64_t i) const {
        const __mmask16 inside = i + LANES < b ? 0xffff : 0x7fff;
        const __m256i start = _mm256_set1_epi16(static_cast<int16_t>(x[0].bits));
        Halves left;
        std::memcpy(&left, x + i, sizeof left);
        const Halves right = (Halves)_mm256_mask_loadu_epi16(start, inside, x + i + 1);
        return __builtin_convertvector(left, Words) | __builtin_convertvector(right, Words) << 16;
    }

    INLINE_MEMBER static void write_half(Words from, Words next, Words* to) {
        const __m512i low = (__m512i)from, high = (__m512i)next;
        to[0] = from;
        to[1] = (Words)_mm512_alignr_epi32(high, low, 2);
        to[2] = (Words)_mm512_alignr_epi32(high, low, 4);
        to[3] = (Words)_mm512_alignr_epi32(high, low, 6);
        to[4] = (Words)_mm512_alignr_epi32(high, low, 8);
        to[5] = (Words)_mm512_alignr_epi32(high, low, 10);
        to[6] = (Words)_mm512_alignr_epi32(high, low, 12);
        to[7] = (Words)_mm512_alignr_epi32(high, low, 14);
    }

    // Four tiles of sums from p on, or two, over `count` inputs more.
    template <bool FOUR>
    void multiply(const bfloat16* rows, int64_t count, int64_t p, bool first) {
        const int64_t stride = in_size * static_cast<int64_t>(sizeof(bfloat16));
        const int64_t bytes = b * static_cast<int64_t>(sizeof(float));
        float* to = sums + p;
        if (first) {
            _tile_zero(0);
            _tile_zero(1);
            if (FOUR) {
                _tile_zero(2);
                _tile_zero(3);
            }
        } else {
            _tile_loadd(0, to, bytes);
            _tile_loadd(1, to + TILE_OUTS, bytes);
            if (FOUR) {
                _tile_loadd(2, to + 2 * TILE_OUTS, bytes);
                _tile_loadd(3, to + 3 * TILE_OUTS, bytes);
            }
        }
        const Words* tiles = halves;
        for (int64_t n = 0; n < count; n += b, tiles += halves_of(b) * HALF)
            for (int64_t d = 0; d < b; d += TILE_INS) {
                const auto tile = [&](int64_t t) {
                    const int64_t at = d + p + t * TILE_OUTS;
                    return tiles + (at < b ? at : at - b) / TILE_OUTS * HALF;
                };
                ahead.fetch(TILE_ROWS);
                _tile_loadd(4, rows + n + d, stride);
                _tile_loadd(5, tile(0), TILE_BYTES);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(6, tile(1), TILE_BYTES);
                _tile_dpbf16ps(1, 4, 6);
                if (FOUR) {
                    _tile_loadd(7, tile(2), TILE_BYTES);
                    _tile_dpbf16ps(2, 4, 7);
                    _tile_loadd(5, tile(3), TILE_BYTES);
                    _tile_dpbf16ps(3, 4, 5);
                }
            }
        _tile_stored(0, to, bytes);
        _tile_stored(1, to + TILE_OUTS, bytes);
        if (FOUR) {
            _tile_stored(2, to + 2 * TILE_OUTS, bytes);
            _tile_stored(3, to + 3 * TILE_OUTS, bytes);
        }
    }
};

#endif
