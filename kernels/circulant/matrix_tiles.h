// add_circulant in bfloat16 on the processor's matrix unit. For one row of x,
//   Y[m, p] = sum_n sum_d K[m, n, d] X_n[d, p],  X_n[d, p] = x_n[(p + d) mod b],
// is a product of matrices. A tile of K is sixteen of its rows m as they lie. X_n is constant along
// its antidiagonals: with pairs[j] = (x_n[j mod b], x_n[(j + 1) mod b]), the tile of it that begins at
// (d, p) has pairs[d + p + 2 i + j] in its row i and column j, two rows of X_n being one of the tile.
// So X_n has b / 16 different tiles, and the second half of each is the first half of the next. These
// halves are written once for some blocks of x, and every product finds its tile where two of them lie.
// (A tile could be loaded from `pairs` itself, but rows across two cache lines take six times as long.)
// Every Y[m, p] runs over n and d in one order, so a row's result has the same bits in any company.
#pragma once

#include <memory>
#include <optional>
#include <utility>

#include "../cpu/amx.h"
#include "../cpu/products.h"
#include "kernel.h"

#ifdef HAS_AMX

// Up to a tile's rows of K, one behind the other from kernel.numbers on, for some rows of x and y. Row
// i of them gives the block of y that begins at columns[i].
struct CirculantUnit {
    CirculantKernel<bfloat16> kernel;
    int64_t count;
    int64_t columns[TILE_ROWS];
    Matrix<bfloat16> y;
    Matrix<const bfloat16> x;
    int64_t rows;
    float weight;
};

// Asks memory for x and K in the order in which the units read them, some tiles of K ahead: what is
// asked for sooner leaves the first cache level again, and in other orders takes longer to come.
class UnitsAhead {
    static constexpr int64_t LEAD = 8;  // tiles
    const CirculantUnit *unit, *expected = nullptr;
    const CirculantUnit* const end;
    int64_t row = 0, in = 0;

  public:
    explicit UnitsAhead(const CirculantUnit* end) : unit(end), end(end) {}

    // A unit begins: as a rule the one behind the last.
    void begin(const CirculantUnit& next) {
        if (&next != expected) {
            unit = &next;
            row = in = 0;
            for (int64_t i = 0; i < LEAD; ++i) fetch();
        }
        expected = &next + 1;
    }

    // A tile of K is about to be read: asks for another one, K's only for the first row of x.
    INLINE_MEMBER void fetch() {
        if (unit == end) return;
        const CirculantKernel<bfloat16>& kernel = unit->kernel;
        __builtin_prefetch(unit->x.row(row) + in);
        for (int64_t i = 0; i < (row ? 0 : unit->count); ++i)
            __builtin_prefetch(kernel.numbers + i * kernel.in_size + in);
        in += TILE_INS;
        if (in < kernel.in_size) return;
        in = 0;
        if (++row < unit->rows) return;
        row = 0;
        ++unit;
    }
};

// Computes the units of one thread. A row's sums are added to y while the next row is multiplied, since
// they can only be read when the matrix unit has come to its end.
class MatrixCirculant {
    static constexpr int64_t STRIP = 4;  // tiles of sums at once
    static constexpr int64_t STRIP_OUTS = STRIP * TILE_OUTS;
    static constexpr int64_t CHUNK_INS = 640;
    static constexpr int64_t HALF = TILE_INS / 4;  // rows of half a tile

    const std::unique_ptr<Words[]> scratch;
    Words* const halves;  // of X_n's tiles: (chunk, b / 16 + 1, HALF), the first once more at the end
    float* const sums;    // (count, b)
    UnitsAhead ahead;
    std::optional<TilesInUse> tiles_in_use;
    int64_t shaped = 0;                      // rows of K that the tiles have
    const CirculantUnit* finished = nullptr;  // whose sums are to be added to y
    int64_t finished_row = 0;
    int64_t b = 0, in_size = 0;  // of the unit that runs

  public:
    // Whether the tiles fit these blocks.
    static bool fits(const CirculantKernel<bfloat16>& kernel) { return kernel.b % TILE_INS == 0; }

    // Vectors of memory that units of blocks of b need: for sums, and for halves.
    static int64_t sums_size(int64_t b) { return TILE_ROWS * b / LANES; }
    static int64_t halves_size(int64_t b) {
        return b == STRIP_OUTS ? 2 * halves_of(b) : chunk_of(b) * halves_of(b);
    }

    MatrixCirculant(int64_t sums_size, int64_t halves_size, const CirculantUnit* end)
        : scratch(new Words[sums_size + halves_size]), halves(scratch.get()),
          sums(reinterpret_cast<float*>(halves + halves_size)), ahead(end) {}

    ~MatrixCirculant() { finish(); }
    MatrixCirculant(const MatrixCirculant&) = delete;
    MatrixCirculant& operator=(const MatrixCirculant&) = delete;

    void compute(const CirculantUnit& unit) {
        b = unit.kernel.b;
        in_size = unit.kernel.in_size;
        if (shaped != unit.count) shape(unit.count);
        ahead.begin(unit);
        for (int64_t r = 0; r < unit.rows; ++r) {
            for (int64_t i = 0; i < unit.count; ++i)
                for (int64_t p = 0; p < b; p += TILE_INS)
                    __builtin_prefetch(unit.y.row(r) + unit.columns[i] + p, 1);
            if (b == STRIP_OUTS) correlate_strip(unit.x.row(r), unit.kernel.numbers);
            else correlate(unit.x.row(r), unit.kernel.numbers);
            finished = &unit;
            finished_row = r;
        }
    }

  private:
    // Vectors of the halves of one X_n.
    static int64_t halves_of(int64_t b) { return (b / TILE_OUTS + 1) * HALF; }

    // How many X_n there are tiles of at once: they stay in the first cache level.
    static int64_t chunk_of(int64_t b) { return max_of(1, CHUNK_INS / b); }

    // Tiles 0 .. 3 are sums, 4 and 5 are of K, 6 and 7 of X.
    void shape(int64_t count) {
        TileConfig config;
        for (int tile = 0; tile < 6; ++tile) config.shape(tile, count, TILE_BYTES);
        tiles_in_use.emplace(config);
        shaped = count;
    }

    // Adds the last row's sums to y.
    void finish() {
        if (!finished) return;
        const CirculantUnit& unit = *finished;
        const int64_t b = unit.kernel.b;
        for (int64_t i = 0; i < unit.count; ++i)
            add_weighted<bfloat16>({unit.y.row(finished_row) + unit.columns[i], b}, {sums + i * b, b},
                                   1, b, unit.weight);
        finished = nullptr;
    }

    // sums (count, b) of a row x, from `rows` of K
    void correlate(const bfloat16* x, const bfloat16* rows) {
        finish();
        const int64_t step = chunk_of(b) * b;
        for (int64_t in = 0; in < in_size; in += step) {
            const int64_t size = min_of(step, in_size - in);
            write_halves(x + in, size, halves);
            int64_t p = 0;
            for (; p + STRIP * TILE_OUTS <= b; p += STRIP * TILE_OUTS)
                multiply<true>(rows + in, size, p, in == 0);
            for (; p < b; p += 2 * TILE_OUTS) multiply<false>(rows + in, size, p, in == 0);
        }
    }

    // The same for b = 64. The sums stay in their tiles, each tile of X meets both of K's, and the next
    // X_n is written beforehand: tiles can be loaded only when what was stored has reached the cache.
    void correlate_strip(const bfloat16* x, const bfloat16* rows) {
        const int64_t stride = in_size * static_cast<int64_t>(sizeof(bfloat16));
        Words *now = halves, *next = halves + halves_of(STRIP_OUTS);
        write_halves(x, STRIP_OUTS, now);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t n = 0; n < in_size; n += STRIP_OUTS) {
            if (n == STRIP_OUTS) finish();
            if (n + STRIP_OUTS < in_size) write_halves(x + n + STRIP_OUTS, STRIP_OUTS, next);
            ahead.fetch();
            memory_is_written();
            _tile_loadd(4, rows + n, stride);
            _tile_loadd(5, rows + n + TILE_INS, stride);
            _tile_loadd(6, now, TILE_BYTES);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(7, now + HALF, TILE_BYTES);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
            ahead.fetch();
            _tile_loadd(6, now + 2 * HALF, TILE_BYTES);
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(0, 5, 6);
            _tile_loadd(7, now + 3 * HALF, TILE_BYTES);
            _tile_dpbf16ps(3, 4, 7);
            _tile_dpbf16ps(1, 5, 7);
            std::swap(now, next);
        }
        finish();
        constexpr int64_t BYTES = STRIP_OUTS * sizeof(float);
        _tile_stored(0, sums, BYTES);
        _tile_stored(1, sums + TILE_OUTS, BYTES);
        _tile_stored(2, sums + 2 * TILE_OUTS, BYTES);
        _tile_stored(3, sums + 3 * TILE_OUTS, BYTES);
    }

    void write_halves(const bfloat16* x, int64_t size, Words* to) const {
        for (int64_t n = 0; n < size; n += b, x += b) {
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

    // Four tiles of sums from p on, or two, over `size` inputs more.
    template <bool FOUR>
    void multiply(const bfloat16* rows, int64_t size, int64_t p, bool first) {
        const int64_t stride = in_size * static_cast<int64_t>(sizeof(bfloat16));
        const int64_t bytes = b * static_cast<int64_t>(sizeof(float));
        float* to = sums + p;
        memory_is_written();
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
        for (int64_t n = 0; n < size; n += b, tiles += halves_of(b))
            for (int64_t d = 0; d < b; d += TILE_INS) {
                const auto tile = [&](int64_t t) {
                    const int64_t at = d + p + t * TILE_OUTS;
                    return tiles + (at < b ? at : at - b) / TILE_OUTS * HALF;
                };
                if (p == 0) ahead.fetch();
                _tile_loadd(4, rows + n + d, stride);
                _tile_loadd(6, tile(0), TILE_BYTES);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, tile(1), TILE_BYTES);
                _tile_dpbf16ps(1, 4, 7);
                if (FOUR) {
                    _tile_loadd(6, tile(2), TILE_BYTES);
                    _tile_dpbf16ps(2, 4, 6);
                    _tile_loadd(7, tile(3), TILE_BYTES);
                    _tile_dpbf16ps(3, 4, 7);
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
