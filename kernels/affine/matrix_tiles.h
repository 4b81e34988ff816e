// correct_affine in bfloat16 on the processor's matrix unit. A few rows take the way that reads A and B
// as they lie, as for them all the work is to read; more rows take the way that turns A and B into tiles
// first. Both add the same products in the same order, so that a row has the same bits on either:
//   shrink  h = A x over tiles of 32 inputs, within one even and odd inputs apart, as the unit does;
//   expand  delta = B^T (high + low) over tiles of 16 ranks, even and odd ranks apart, where
//           high + low is w h as two bfloat16, which keep 16 of its bits.
#pragma once

#include "../cpu/amx.h"
#include "../cpu/expand.h"
#include "../cpu/tables.h"

// One adapter at one target: A (rank, ins) and B (rank, outs), null where the rank is 0; c and g (outs,)
// may be null.
template <class W>
struct LowRank {
    int64_t rank, ins, outs;
    const W *a = nullptr, *b = nullptr, *bias = nullptr, *scale = nullptr;
};

#ifdef HAS_AMX

class MatrixAffine {
    static constexpr int64_t FEW_ROWS = 4;  // below this, making tiles costs more than it saves
    static constexpr int64_t STRIP = 2 * TILE_OUTS;
    static constexpr int64_t WIDE = 8 * STRIP;  // outputs of y read and written in one go
    static constexpr int64_t PAIR_BYTES = 2 * sizeof(bfloat16);
    static constexpr int64_t SIZE = Pack<bfloat16>::SIZE, PACKS = 4;  // of B at once, a line each

    const LowRank<bfloat16>& adapter;
    const int64_t ranks, in_tiles;  // the rank in whole tiles
    float *h, *sums;                          // (ROWS, ranks) with zeros past the rank; (32, WIDE)
    bfloat16 *factors;                        // (ROWS, 2 ranks): high and low pairs in turns
    bfloat16 *a_tiles, *b_tiles, *copied_x;   // (in_tiles, TILE); (WIDE / 16, ranks / 16, TILE); x

  public:
    static constexpr int64_t ROWS = 4 * TILE_ROWS;  // at most

    // Floats of memory that it needs.
    static int64_t scratch(const LowRank<bfloat16>& adapter) {
        const int64_t ranks = div_up(adapter.rank, TILE_OUTS) * TILE_OUTS;
        const int64_t ins = div_up(adapter.ins, TILE_INS) * TILE_INS;
        const int64_t halves = ROWS * 2 * ranks + ins * TILE_OUTS + 2 * ranks * WIDE + ROWS * ins;
        return ROWS * ranks + 2 * TILE_ROWS * WIDE + halves / 2;
    }

    // The scratch begins a line of cache.
    MatrixAffine(const LowRank<bfloat16>& adapter, float* scratch)
        : adapter(adapter), ranks(div_up(adapter.rank, TILE_OUTS) * TILE_OUTS),
          in_tiles(div_up(adapter.ins, TILE_INS)), h(scratch) {
        sums = h + ROWS * ranks;
        factors = reinterpret_cast<bfloat16*>(sums + 2 * TILE_ROWS * WIDE);
        a_tiles = factors + ROWS * 2 * ranks;
        b_tiles = a_tiles + in_tiles * TILE;
        copied_x = b_tiles + 2 * ranks * WIDE;
    }

    // y (rows, outs) = g y + w (x A^T) B + w c, for at most ROWS rows
    void correct(Matrix<bfloat16> y, Matrix<const bfloat16> x, int64_t rows, float weight,
                 Ahead next) {
        if (rows < FEW_ROWS) {
            for (int64_t r = 0; r < rows; ++r) correct_row(y.row(r), x.row(r), weight, next);
        } else if (adapter.rank) {
            const TilesInUse in_use{TileConfig()};
            shrink(x, rows);
            split(div_up(rows, TILE_ROWS) * TILE_ROWS, weight);
            expand_tiles(y, rows, weight);
        } else {
            std::memset(sums, 0, sizeof(float) * 2 * TILE_ROWS * WIDE);
            for (int64_t r = 0; r < rows; r += 2 * TILE_ROWS)
                for (int64_t out = 0; out < adapter.outs; out += WIDE)
                    write(y.from(r), min_of(2 * TILE_ROWS, rows - r), out, weight);
        }
    }

  private:
    // g y + (delta + w c), rounded once.
    INLINE_MEMBER static Floats corrected(Floats y, Floats delta, Floats bias, const Floats* scale,
                                          float weight) {
        const Floats added = delta + weight * bias;
        return scale ? y * *scale + added : y + added;
    }

    // ---- one row. What is read next is asked for meanwhile: A and B are read by columns of a few of
    // their rows, which the processor does not see coming.

    void correct_row(bfloat16* y, const bfloat16* x, float weight, Ahead& next) {
        shrink_row(x);
        split(1, weight);
        int64_t out = 0;
        for (; out + PACKS * SIZE <= adapter.outs; out += PACKS * SIZE) {
            next.fetch(TILE_OUTS * PACKS);
            expand_row<PACKS>(y, out, weight);
        }
        next.fetch(TILE_OUTS * PACKS);
        for_groups(adapter.outs - out, SIZE,
                   [&](int64_t i, auto... n) { expand_row<1>(y, out + i, weight, n...); });
    }

    // Tiles of A's rows as they lie, times the row as a column of pairs: tile 0 is of sums, 4 of A, 5 of x.
    void shrink_row(const bfloat16* x) {
        for (int64_t rank = 0; rank < adapter.rank; rank += TILE_OUTS) {
            const int64_t count = min_of(TILE_OUTS, adapter.rank - rank);
            if (count < TILE_OUTS) std::memset(h + rank, 0, TILE_OUTS * sizeof(float));
            TileConfig config;
            config.shape(0, count, PAIR_BYTES);
            config.shape(4, count, TILE_BYTES);
            config.shape(5, TILE_INS / 2, PAIR_BYTES);
            const TilesInUse in_use(config);
            const int64_t next = rank + count;
            if (next == adapter.rank) ask_for_columns();
            const int64_t left = min_of(TILE_OUTS, adapter.rank - next);
            dot_tile(x, rank, count, Ahead(adapter.a + next * adapter.ins, left * adapter.ins));
        }
    }

    // The columns of B that are read first.
    void ask_for_columns() const {
        for (int64_t k = 0; k < adapter.rank; ++k)
            for (int64_t pack = 0; pack < PACKS; ++pack)
                __builtin_prefetch(adapter.b + k * adapter.outs + pack * SIZE, 0, Ahead::NEAR);
    }

    void dot_tile(const bfloat16* x, int64_t rank, int64_t count, Ahead next) {
        const int64_t ins = adapter.ins, whole = ins / TILE_INS * TILE_INS;
        const bfloat16* a = adapter.a + rank * ins;
        memory_is_written();
        _tile_zero(0);
        for (int64_t in = 0; in < whole; in += TILE_INS) {
            next.fetch(TILE_OUTS);
            _tile_loadd(4, a + in, ins * static_cast<int64_t>(sizeof(bfloat16)));
            _tile_loadd(5, x + in, PAIR_BYTES);
            _tile_dpbf16ps(0, 4, 5);
        }
        if (whole < ins) {
            copy_padded({a + whole, ins}, count, ins - whole, {a_tiles, TILE_INS});
            copy_padded({x + whole, 0}, 1, ins - whole, {copied_x, TILE_INS});
            memory_is_written();
            _tile_loadd(4, a_tiles, TILE_BYTES);
            _tile_loadd(5, copied_x, PAIR_BYTES);
            _tile_dpbf16ps(0, 4, 5);
        }
        _tile_stored(0, h + rank, PAIR_BYTES);
    }

    // C packs of outputs from `out` on; n, where given, is how many there are of a single one.
    template <int C, class... N>
    INLINE_MEMBER void expand_row(bfloat16* y, int64_t out, float weight, N... n) const {
        using P = Pack<bfloat16>;
        P delta[C] = {};
        for (int64_t tile = 0; tile < adapter.rank; tile += TILE_OUTS) {
            P even[C] = {}, odd[C] = {};
            const int64_t end = min_of(tile + TILE_OUTS, adapter.rank);
            for (int64_t k = tile; k < end; k += 2) {
                add_rank(k, out, even, n...);
                if (k + 1 < end) add_rank(k + 1, out, odd, n...);
            }
            for (int c = 0; c < C; ++c)
                for (int part = 0; part < P::PARTS; ++part)
                    delta[c].part[part] += even[c].part[part] + odd[c].part[part];
        }
        for (int c = 0; c < C; ++c) {
            const int64_t at = out + c * P::SIZE;
            const P bias = adapter.bias ? load_pack(adapter.bias + at, n...) : P{};
            const P scale = adapter.scale ? load_pack(adapter.scale + at, n...) : P{};
            P sum = load_pack(y + at, n...);
            for (int part = 0; part < P::PARTS; ++part)
                sum.part[part] = corrected(sum.part[part], delta[c].part[part], bias.part[part],
                                           adapter.scale ? &scale.part[part] : nullptr, weight);
            store_pack(y + at, sum, n...);
        }
    }

    // sum += (high + low of the first row's rank k) B_k
    template <int C, class... N>
    INLINE_MEMBER void add_rank(int64_t k, int64_t out, Pack<bfloat16> (&sum)[C], N... n) const {
        using P = Pack<bfloat16>;
        const bfloat16* pairs = factors + k / 2 * 4 + k % 2;
        const float high = to_float(pairs[0]), low = to_float(pairs[2]);
        const bfloat16* b = adapter.b + k * adapter.outs + out;
        for (int c = 0; c < C; ++c) {
            __builtin_prefetch(b + (C + c) * P::SIZE, 0, Ahead::NEAR);
            const P values = load_pack(b + c * P::SIZE, n...);
            for (int part = 0; part < P::PARTS; ++part) {
                sum[c].part[part] += high * values.part[part];
                sum[c].part[part] += low * values.part[part];
            }
        }
    }

    // ---- several rows

    // h = x A^T: tiles 0 .. 3 are sums, 4 and 5 of x, 6 of A.
    void shrink(Matrix<const bfloat16> x, int64_t rows) {
        const int64_t tiles = div_up(rows, TILE_ROWS);
        Matrix<const bfloat16> inputs[ROWS / TILE_ROWS];
        for (int64_t t = 0; t < tiles; ++t)
            inputs[t] = tile_rows(x, t, min_of(TILE_ROWS, rows - t * TILE_ROWS));
        for (int64_t rank = 0; rank < adapter.rank; rank += TILE_OUTS) {
            pack_a(rank);
            switch (tiles) {
                case 1: multiply<1>(inputs, rank); break;
                case 2: multiply<2>(inputs, rank); break;
                case 3: multiply<3>(inputs, rank); break;
                default: multiply<4>(inputs, rank);
            }
        }
    }

    // Sixteen rows of x over whole tiles: where they lie, or copied with zeros behind them.
    Matrix<const bfloat16> tile_rows(Matrix<const bfloat16> x, int64_t tile, int64_t count) {
        const Matrix<const bfloat16> rows = x.from(tile * TILE_ROWS);
        if (count == TILE_ROWS && adapter.ins % TILE_INS == 0) return rows;
        const int64_t padded = in_tiles * TILE_INS;
        const Matrix<bfloat16> copied{copied_x + tile * TILE_ROWS * padded, padded};
        std::memset(copied.data, 0, TILE_ROWS * padded * sizeof(bfloat16));
        for (int64_t r = 0; r < count; ++r)
            std::memcpy(copied.row(r), rows.row(r), adapter.ins * sizeof(bfloat16));
        return copied;
    }

    // Sixteen rows of A from `rank` on as tiles: pairs of inputs by rows, zeros past the edges.
    void pack_a(int64_t rank) {
        const int64_t count = min_of(TILE_OUTS, adapter.rank - rank);
        for (int64_t k = 0; k < in_tiles; ++k) {
            const int64_t size = min_of(TILE_INS, adapter.ins - k * TILE_INS) * sizeof(bfloat16);
            Floats pairs[LANES] = {};
            for (int64_t r = 0; r < count; ++r)
                std::memcpy(&pairs[r], adapter.a + (rank + r) * adapter.ins + k * TILE_INS, size);
            transpose(pairs);
            std::memcpy(a_tiles + k * TILE, pairs, sizeof pairs);
        }
    }

    template <int TILES>
    void multiply(const Matrix<const bfloat16>* x, int64_t rank) {
        const auto bytes = [&](int t) { return x[t].stride * int64_t(sizeof(bfloat16)); };
        memory_is_written();
        _tile_zero(0);
        if (TILES > 1) _tile_zero(1);
        if (TILES > 2) _tile_zero(2);
        if (TILES > 3) _tile_zero(3);
        for (int64_t k = 0; k < in_tiles; ++k) {
            _tile_loadd(6, a_tiles + k * TILE, TILE_BYTES);
            _tile_loadd(4, x[0].data + k * TILE_INS, bytes(0));
            _tile_dpbf16ps(0, 4, 6);
            if (TILES > 1) {
                _tile_loadd(5, x[1].data + k * TILE_INS, bytes(1));
                _tile_dpbf16ps(1, 5, 6);
            }
            if (TILES > 2) {
                _tile_loadd(4, x[2].data + k * TILE_INS, bytes(2));
                _tile_dpbf16ps(2, 4, 6);
            }
            if (TILES > 3) {
                _tile_loadd(5, x[3].data + k * TILE_INS, bytes(3));
                _tile_dpbf16ps(3, 5, 6);
            }
        }
        const int64_t stride = ranks * sizeof(float), tile = TILE_ROWS * ranks;
        _tile_stored(0, h + rank, stride);
        if (TILES > 1) _tile_stored(1, h + rank + tile, stride);
        if (TILES > 2) _tile_stored(2, h + rank + 2 * tile, stride);
        if (TILES > 3) _tile_stored(3, h + rank + 3 * tile, stride);
    }

    // factors = w h: of every two ranks what is left after rounding to bfloat16, and what that took away.
    void split(int64_t rows, float weight) {
        const __m512i turns = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
        for (int64_t i = 0; i < rows * ranks; i += LANES) {
            const Floats v = load(h + i) * weight;
            const Halves high = rounded(v);
            const Floats taken = v - (Floats)(__builtin_convertvector(high, Words) << 16);
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)high),
                                                    (__m256i)rounded(taken), 1);
            _mm512_storeu_si512(factors + 2 * i, _mm512_permutexvar_epi32(turns, both));
        }
    }

    // Some outputs for all rows: tiles 0 .. 3 are sums, 4 and 5 of factors, 6 and 7 of B. Fewer of them
    // at a time would touch rows of y that lie far apart so briefly that nothing could be read ahead.
    void expand_tiles(Matrix<bfloat16> y, int64_t rows, float weight) {
        for (int64_t out = 0; out < adapter.outs; out += WIDE) {
            const int64_t strips = div_up(min_of(WIDE, adapter.outs - out), STRIP);
            for (int64_t strip = 0; strip < strips; ++strip)
                for (int64_t rank = 0; rank < adapter.rank; rank += 2)
                    pair_up(rank, out + strip * STRIP, b_tile(2 * strip, rank));
            for (int64_t row = 0; row < rows; row += 2 * TILE_ROWS) {
                const int64_t count = min_of(2 * TILE_ROWS, rows - row);
                for (int64_t strip = 0; strip < strips; ++strip)
                    if (count > TILE_ROWS) combine_tiles<true>(row, strip);
                    else combine_tiles<false>(row, strip);
                write(y.from(row), count, out, weight);
            }
        }
    }

    // Ranks `rank` and `rank + 1` side by side, in two rows of a tile: for high and for low factors.
    void pair_up(int64_t rank, int64_t out, bfloat16* first_tile) {
        const int64_t count = min_of(STRIP, adapter.outs - out), next_tile = ranks / TILE_OUTS * TILE;
        if (rank % TILE_OUTS == 0 && rank + TILE_OUTS > adapter.rank)
            for (int64_t tile = 0; tile < 2; ++tile)
                std::memset(first_tile + tile * next_tile, 0, TILE * sizeof(bfloat16));
        const bfloat16* b = adapter.b + rank * adapter.outs + out;
        const __m512i first = part(b, count);
        const __m512i second = rank + 1 < adapter.rank ? part(b + adapter.outs, count) : __m512i{};
        const __m512i low = _mm512_unpacklo_epi16(first, second);
        const __m512i high = _mm512_unpackhi_epi16(first, second);
        const __m512i low_outs = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i high_outs = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        const __m512i pairs[2] = {_mm512_permutex2var_epi64(low, low_outs, high),
                                  _mm512_permutex2var_epi64(low, high_outs, high)};
        for (int64_t tile = 0; tile < 2; ++tile) {
            bfloat16* to = first_tile + tile * next_tile + rank % TILE_OUTS * TILE_INS;
            _mm512_storeu_si512(to, pairs[tile]);
            _mm512_storeu_si512(to + TILE_INS, pairs[tile]);
        }
    }

    // Of sixteen outputs, the nth of those that are computed in one go.
    bfloat16* b_tile(int64_t n, int64_t rank) const {
        return b_tiles + (n * ranks + rank) / TILE_OUTS * TILE;
    }

    static __m512i part(const bfloat16* from, int64_t count) {
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((int64_t{1} << count) - 1), from);
    }

    // sums (16 or 32 rows from `row` on, STRIP) = factors B
    template <bool TWO>
    void combine_tiles(int64_t row, int64_t strip) {
        const int64_t stride = 2 * ranks * sizeof(bfloat16), bytes = WIDE * sizeof(float);
        float* to = sums + strip * STRIP;
        const bfloat16* first = factors + row * 2 * ranks;
        memory_is_written();
        _tile_zero(0);
        _tile_zero(1);
        if (TWO) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t rank = 0; rank < adapter.rank; rank += TILE_OUTS, first += TILE_INS) {
            _tile_loadd(4, first, stride);
            _tile_loadd(6, b_tile(2 * strip, rank), TILE_BYTES);
            _tile_loadd(7, b_tile(2 * strip + 1, rank), TILE_BYTES);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (TWO) {
                _tile_loadd(5, first + TILE_ROWS * 2 * ranks, stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, to, bytes);
        _tile_stored(1, to + TILE_OUTS, bytes);
        if (TWO) {
            _tile_stored(2, to + TILE_ROWS * WIDE, bytes);
            _tile_stored(3, to + TILE_ROWS * WIDE + TILE_OUTS, bytes);
        }
    }

    // y = corrected sums for all outputs from `out` on that there is room for. Whether there are c and g
    // is known to the compiler: most adapters have neither.
    void write(Matrix<bfloat16> y, int64_t rows, int64_t out, float weight) const {
        const bool plain = !adapter.bias && !adapter.scale;
        for (int64_t r = 0; r < rows; ++r) {
            if (plain) write_row<true>(y.row(r) + out, sums + r * WIDE, out, weight);
            else write_row<false>(y.row(r) + out, sums + r * WIDE, out, weight);
        }
    }

    template <bool PLAIN>
    INLINE_MEMBER void write_row(bfloat16* y, const float* sum, int64_t out, float weight) const {
        const bfloat16* bias = adapter.bias ? adapter.bias + out : nullptr;
        const bfloat16* scale = adapter.scale ? adapter.scale + out : nullptr;
        for_groups(min_of(WIDE, adapter.outs - out), LANES, [&](int64_t i, auto... n) {
            const Floats c = !PLAIN && bias ? load(bias + i, n...) : Floats{};
            const Floats g = !PLAIN && scale ? load(scale + i, n...) : Floats{};
            const Floats* factor = !PLAIN && scale ? &g : nullptr;
            store(y + i, corrected(load(y + i, n...), load(sum + i), c, factor, weight), n...);
        });
    }

    // to (rows, TILE_INS) = the first `size` columns of from, zeros behind them
    static void copy_padded(Matrix<const bfloat16> from, int64_t rows, int64_t size,
                            Matrix<bfloat16> to) {
        std::memset(to.data, 0, rows * TILE_BYTES);
        for (int64_t r = 0; r < rows; ++r)
            std::memcpy(to.row(r), from.row(r), size * sizeof(bfloat16));
    }
};

#endif
