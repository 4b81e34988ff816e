// add_kronecker in bfloat16 on the processor's matrix unit, for R that is stored whole. A step is of one
// row of x and up to 64 rows of R:
//   H = X R^T           of up to 16 rows of X, over up to 32 inputs at a time,
//   Y = L (high + low)  over up to 32 rows of H, high + low being H as two bfloat16, which keep 16 of
//                       its bits.
// Tiles have sizes that the factors divide into, so X and L are read as they lie; R is turned into
// pairs of columns. Every sum runs over its products in one order, so a row's result has the same bits
// in any company.
//
// A step is too short for the processor to look past it, and what one product leaves in memory is late
// for the next. So three steps run at a time, each a stage further than the one behind it.
#pragma once

#include <memory>
#include <optional>

#include "cut_tiles.h"

// L (l, m) and R (k, n)
struct WholeFactors {
    int64_t l, m, k, n;
    const bfloat16 *left, *right;
};

#ifdef HAS_AMX

class KroneckerTiles {
    static constexpr int64_t STRIP = 4;       // tiles of columns of Y in a step, at most
    static constexpr int64_t FEW = 32;        // tiles that need no memory from elsewhere
    static constexpr int64_t FEW_LINES = 12;  // of the next unit's factors, asked for in one go

    struct Shape {
        int64_t x_rows = 0, left_rows = 0, x_inner = 0, left_inner = 0;
        bool operator==(const Shape& other) const {
            return x_rows == other.x_rows && left_rows == other.left_rows &&
                   x_inner == other.x_inner && left_inner == other.left_inner;
        }
    };

    struct Step {
        CutRows x_rows, left_rows;
        CutInner x_inner, left_inner;
        Matrix<const bfloat16> x, left;
        Matrix<bfloat16> y;  // (l, columns)
        int64_t columns;
        float weight;
        int64_t tiles() const { return div_up(columns, TILE_OUTS); }
        int64_t width() const { return tiles() * TILE_OUTS; }
    };

  public:
    // What a thread needs, in tiles.
    struct Room {
        int64_t x = 0, left = 0, right = 0, h = 0, pairs = 0, sums = 0;
        int64_t total() const { return x + 2 * left + right + h + pairs + sums; }
        friend Room max_of(const Room& a, const Room& b) {
            return {max_of(a.x, b.x), max_of(a.left, b.left),   max_of(a.right, b.right),
                    max_of(a.h, b.h), max_of(a.pairs, b.pairs), max_of(a.sums, b.sums)};
        }
    };

    static Room room(const WholeFactors& of) {
        const CutInner x_inner(of.n), left_inner(of.m);
        const int64_t strip = min_of(STRIP, div_up(of.k, TILE_OUTS));
        const auto copied = [](int64_t rows, const CutInner& inner) {
            return inner.fits() ? 0 : div_up(rows * inner.padded(), TILE);
        };
        return {copied(of.m, x_inner),        copied(of.l, left_inner),
                x_inner.count * strip,        div_up(of.m, TILE_ROWS) * strip,
                left_inner.count * 2 * strip, div_up(of.l, TILE_ROWS) * strip};
    }

    explicit KroneckerTiles(const Room& room)
        : many(room.total() > FEW ? new TileMemory[room.total()] : nullptr),
          x(many ? many.get() : few), left(x + room.x), next_left(left + room.left),
          right(next_left + room.left), h(right + room.right), pairs(h + room.h),
          sums(pairs + room.pairs) {}

    KroneckerTiles(const KroneckerTiles&) = delete;
    KroneckerTiles& operator=(const KroneckerTiles&) = delete;

    // y += w kron(L, R) x for the rows of a block, the last two steps of which may be left to do.
    void take(const WholeFactors& of, const Block<bfloat16>& block, Ahead& ahead) {
        if (of.n == 0) return;
        const CutRows x_rows(of.m), left_rows(of.l);
        const CutInner x_inner(of.n), left_inner(of.m);
        shape_tiles({x_rows.size, left_rows.size, x_inner.size, left_inner.size});
        std::swap(left, next_left);
        const Matrix<const bfloat16> left_rows_at = tile_rows(of.left, of.l, left_inner, left);
        for (int64_t i = 0; i < of.k; i += STRIP * TILE_OUTS) {
            const int64_t columns = min_of(STRIP * TILE_OUTS, of.k - i);
            turn_right(of, i, columns, x_inner);
            for (int64_t r = 0; r < block.rows; ++r)
                go_on({x_rows, left_rows, x_inner, left_inner,
                       tile_rows(block.x.row(r), of.m, x_inner, x), left_rows_at,
                       {block.y.row(r) + i, of.k}, columns, block.weight},
                      ahead);
        }
    }

    void finish() {
        if (late) add(*late);
        if (recent) {
            pair_up(*recent);
            multiply_left(*recent);
            add(*recent);
        }
        late.reset();
        recent.reset();
    }

  private:
    // On the stack, as allocating takes as long as a step.
    TileMemory few[FEW];
    const std::unique_ptr<TileMemory[]> many;
    TileMemory *x, *left, *next_left;  // copied where they do not fit
    TileMemory *right;                 // (n / 32, tiles): R^T in pairs
    TileMemory *h;                     // (m, width)
    TileMemory *pairs;                 // (m / 32, 2, tiles): high and low of H in pairs
    TileMemory *sums;                  // (l, width)
    Shape shape;
    std::optional<TilesInUse> in_use;
    std::optional<Step> recent, late;  // H is there; Y is there

    void go_on(const Step& step, Ahead& ahead) {
        if (late) add(*late);
        ahead.fetch<Ahead::NEAREST>(FEW_LINES);
        if (recent) pair_up(*recent);
        ahead.fetch<Ahead::NEAREST>(FEW_LINES);
        multiply_right(step);
        ahead.fetch<Ahead::NEAREST>(FEW_LINES);
        if (recent) multiply_left(*recent);
        ahead.fetch<Ahead::NEAREST>(FEW_LINES);
        late = recent;
        recent = step;
    }

    // Tiles 0 and 1 are of H, 2 of X, 3 of R; 4 and 5 of Y, 6 of L, 7 of pairs.
    void shape_tiles(const Shape& wanted) {
        if (wanted == shape) return;
        finish();
        TileConfig config;
        for (int tile = 0; tile < 2; ++tile) {
            config.shape(tile, wanted.x_rows, TILE_BYTES);
            config.shape(4 + tile, wanted.left_rows, TILE_BYTES);
        }
        config.shape(2, wanted.x_rows, wanted.x_inner * sizeof(bfloat16));
        config.shape(3, wanted.x_inner / 2, TILE_BYTES);
        config.shape(6, wanted.left_rows, wanted.left_inner * sizeof(bfloat16));
        config.shape(7, wanted.left_inner / 2, TILE_BYTES);
        in_use.emplace(config);
        shape = wanted;
    }

    // ---- what products need

    // CutRows of which tiles can be loaded: as they lie, or copied with zeros behind them.
    static Matrix<const bfloat16> tile_rows(const bfloat16* from, int64_t rows,
                                            const CutInner& inner, TileMemory* copied) {
        if (inner.fits()) return {from, inner.all};
        const Matrix<bfloat16> to{copied->row<bfloat16>(0), inner.padded()};
        for (int64_t r = 0; r < rows; ++r) {
            std::memcpy(to.row(r), from + r * inner.all, inner.all * sizeof(bfloat16));
            std::memset(to.row(r) + inner.all, 0, (to.stride - inner.all) * sizeof(bfloat16));
        }
        return to;
    }

    void turn_right(const WholeFactors& of, int64_t first, int64_t columns,
                    const CutInner& inner) const {
        TileMemory* to = right;
        for (int64_t t = 0; t < inner.count; ++t)
            for (int64_t i = 0; i < columns; i += TILE_OUTS, ++to)
                turn({of.right + (first + i) * of.n + t * inner.size, of.n},
                     min_of(TILE_OUTS, columns - i), inner.size, of.n - t * inner.size, *to);
    }

    void pair_up(const Step& step) const {
        const CutInner& inner = step.left_inner;
        const int64_t tiles = step.tiles(), width = step.width();
        TileMemory* to = pairs;
        for (int64_t first = 0; first < inner.padded(); first += inner.size, to += tiles)
            for (int64_t t = 0; t < tiles; ++t, ++to) {
                const float* row = h->row<float>(0) + first * width + t * TILE_OUTS;
                for (int64_t i = 0; i < inner.size / 2; ++i, row += 2 * width) {
                    const int64_t there = inner.all - first - 2 * i;
                    const Floats even = there > 0 ? load(row) : Floats{};
                    const Floats odd = there > 1 ? load(row + width) : Floats{};
                    split(even, odd, to->row<Words>(i), to[tiles].row<Words>(i));
                }
            }
    }

    // ---- products

    // H = X R^T
    void multiply_right(const Step& step) const {
        memory_is_written();
        const int64_t tiles = step.tiles(), width = step.width();
        for (int64_t row = 0; row < step.x_rows.all; row += step.x_rows.size) {
            const int64_t start = step.x_rows.start(row);
            float* to = h->row<float>(0) + start * width;
            for (int64_t t = 0; t < tiles; t += 2, to += 2 * TILE_OUTS)
                if (t + 1 < tiles) right_sums<true>(step, start, t, to);
                else right_sums<false>(step, start, t, to);
        }
    }

    template <bool TWO>
    INLINE_MEMBER void right_sums(const Step& step, int64_t start, int64_t t, float* to) const {
        const int64_t stride = step.x.stride * sizeof(bfloat16), tiles = step.tiles();
        const bfloat16* a = step.x.row(start);
        const TileMemory* b = right + t;
        _tile_zero(0);
        if (TWO) _tile_zero(1);
        for (int64_t i = 0; i < step.x_inner.count; ++i, a += step.x_inner.size, b += tiles) {
            _tile_loadd(2, a, stride);
            _tile_loadd(3, b, TILE_BYTES);
            _tile_dpbf16ps(0, 2, 3);
            if (TWO) {
                _tile_loadd(3, b + 1, TILE_BYTES);
                _tile_dpbf16ps(1, 2, 3);
            }
        }
        const int64_t bytes = step.width() * sizeof(float);
        _tile_stored(0, to, bytes);
        if (TWO) _tile_stored(1, to + TILE_OUTS, bytes);
    }

    // Y = L (high + low)
    void multiply_left(const Step& step) const {
        memory_is_written();
        const int64_t tiles = step.tiles(), width = step.width();
        for (int64_t row = 0; row < step.left_rows.all; row += step.left_rows.size) {
            const int64_t start = step.left_rows.start(row);
            float* to = sums->row<float>(0) + start * width;
            for (int64_t t = 0; t < tiles; t += 2, to += 2 * TILE_OUTS)
                if (t + 1 < tiles) left_sums<true>(step, start, t, to);
                else left_sums<false>(step, start, t, to);
        }
    }

    template <bool TWO>
    INLINE_MEMBER void left_sums(const Step& step, int64_t start, int64_t t, float* to) const {
        const int64_t stride = step.left.stride * sizeof(bfloat16), tiles = step.tiles();
        const bfloat16* a = step.left.row(start);
        const TileMemory* b = pairs + t;
        _tile_zero(4);
        if (TWO) _tile_zero(5);
        for (int64_t i = 0; i < step.left_inner.count; ++i, a += step.left_inner.size) {
            _tile_loadd(6, a, stride);
            for (int part = 0; part < 2; ++part, b += tiles) {
                _tile_loadd(7, b, TILE_BYTES);
                _tile_dpbf16ps(4, 6, 7);
                if (TWO) {
                    _tile_loadd(7, b + 1, TILE_BYTES);
                    _tile_dpbf16ps(5, 6, 7);
                }
            }
        }
        const int64_t bytes = step.width() * sizeof(float);
        _tile_stored(4, to, bytes);
        if (TWO) _tile_stored(5, to + TILE_OUTS, bytes);
    }

    // ---- y

    // The last columns are added as a whole or half vector where they are one: what is read right
    // behind a masked store waits until that is in the cache.
    void add(const Step& step) const {
        switch (step.columns % TILE_OUTS) {
            case 0: return add(step, [](bfloat16* y, __m512 weight, const float* delta) {
                const auto at = reinterpret_cast<__m256i*>(y);
                _mm256_storeu_si256(at, sum(_mm256_loadu_si256(at), weight, delta));
            });
            case 8: return add(step, [](bfloat16* y, __m512 weight, const float* delta) {
                const auto at = reinterpret_cast<__m128i*>(y);
                const __m256i old = _mm256_castsi128_si256(_mm_loadu_si128(at));
                _mm_storeu_si128(at, _mm256_castsi256_si128(sum(old, weight, delta)));
            });
            default: return add(step, [&](bfloat16* y, __m512 weight, const float* delta) {
                const __mmask16 some = first_of(step.columns % TILE_OUTS);
                const __m256i old = _mm256_maskz_loadu_epi16(some, y);
                _mm256_mask_storeu_epi16(y, some, sum(old, weight, delta));
            });
        }
    }

    template <class AddLast>
    INLINE_MEMBER void add(const Step& step, AddLast add_last) const {
        const int64_t whole = step.tiles() - 1;
        const __m512 weight = _mm512_set1_ps(step.weight);
        const float* delta = sums->row<float>(0);
        bfloat16* y = step.y.data;
        for (int64_t r = 0; r < step.left_rows.all; ++r, y += step.y.stride) {
            for (int64_t t = 0; t < whole; ++t, delta += TILE_OUTS) {
                __m256i* at = reinterpret_cast<__m256i*>(y + t * TILE_OUTS);
                _mm256_storeu_si256(at, sum(_mm256_loadu_si256(at), weight, delta));
            }
            add_last(y + whole * TILE_OUTS, weight, delta);
            delta += TILE_OUTS;
        }
    }

    INLINE_MEMBER static __m256i sum(__m256i y, __m512 weight, const float* delta) {
        const __m512 old = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16));
        return (__m256i)_mm512_cvtneps_pbh(_mm512_fmadd_ps(weight, _mm512_load_ps(delta), old));
    }
};

#endif
