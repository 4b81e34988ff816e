// Attention on the processor's matrix unit, for bfloat16 heads of whole tiles. Scores come out
// transposed, as K Q^T: so the keys, which are most of what is read, are multiplied as they lie in the
// cache, and a vector holds the scores of sixteen columns with one key, so that softmax needs nothing
// across lanes. Weights are turned back, each as the sum of two bfloat16, which keep 16 of its bits; the
// values' rows are paired up once a tile. Of a decode row, a tile has few columns: their scores are turned
// first, so that a vector holds those of one column with sixteen keys, and no lane is idle. Either way
// adds the same numbers in the same order.
#pragma once

#include "../cpu/amx.h"
#include "step.h"

#ifdef HAS_AMX

#include <memory>

// Tiles 2 and 3 are sums. Of scores, 0 is of queries, 4 and 5 of keys; of what the weights give, 0 and 1
// are of weights, 4 and 5 of values.
class MatrixTiles {
    static constexpr int64_t GROUPS = KEYS / TILE_ROWS;
    static constexpr int64_t FEW = 4;  // columns: what of them is turned at once

    // What is asked for ahead while 32 numbers of two values are paired up, and while tiles of keys or
    // values are multiplied: over a whole tile of a head, as many lines as it has.
    static constexpr int64_t PAIR_LINES = 2, TILE_LINES = 16;

    struct alignas(64) CacheLine {
        uint8_t bytes[64];
    };

    // Sixteen columns: what they have seen so far, and the keys they see.
    struct alignas(64) State {
        Floats highest, total;
        Ints first, end;
    };

    const Step<bfloat16>& step;
    int64_t head_dim, in_tiles;
    std::unique_ptr<CacheLine[]> memory;
    State* states;      // (columns / 16)
    uint32_t* queries;  // (columns / 16, in_tiles, 16 pairs, 16 columns)
    float* out;         // (columns, head_dim) in the order of the values, not yet divided by the total
    bfloat16 *copied_keys, *copied_values;  // (KEYS, head_dim) each
    bfloat16* values;  // (KEYS / 32, head_dim / 16, 16 pairs, 16 x 2)
    const bfloat16* keys[GROUPS];    // 16 rows each
    alignas(64) float scores[KEYS][TILE_OUTS];
    alignas(64) float few_scores[FEW][KEYS];
    alignas(64) uint32_t weights[2][TILE_ROWS][KEYS / 2];  // pairs: rounded; what rounding took away
    alignas(64) float sums[TILE_ROWS][TILE_INS];
    const Column<bfloat16>* columns = nullptr;
    TilesInUse in_use{TileConfig()};

  public:
    static constexpr int64_t MAX_COLUMNS = 96;  // of a unit, about
    static constexpr int64_t SHARING = TILE_OUTS;

    // Whether all heads of the cache can be computed here.
    static bool fit(const Cache& cache) { return cache.head_dim % TILE_INS == 0 && matrix_unit(); }

    MatrixTiles(const Step<bfloat16>& step, int64_t max_columns)
        : step(step), head_dim(step.cache.head_dim), in_tiles(head_dim / TILE_INS) {
        const int64_t tiles = div_up(max_columns, TILE_OUTS), columns = tiles * TILE_OUTS;
        const int64_t numbers = columns * head_dim * 6 + 3 * KEYS * head_dim * 2;  // bytes
        memory.reset(new CacheLine[(tiles * sizeof(State) + numbers) / sizeof(CacheLine)]());
        states = reinterpret_cast<State*>(memory.get());
        queries = reinterpret_cast<uint32_t*>(states + tiles);
        out = reinterpret_cast<float*>(queries + columns * head_dim / 2);
        copied_keys = reinterpret_cast<bfloat16*>(out + columns * head_dim);
        copied_values = copied_keys + KEYS * head_dim;
        values = copied_values + KEYS * head_dim;
    }

    // Columns q .. end - 1 of the unit have seen nothing yet; q begins a tile of them.
    void begin(const Column<bfloat16>* unit, int64_t q, int64_t end) {
        columns = unit;
        std::memset(out + q * head_dim, 0, (end - q) * head_dim * sizeof(float));
        for (; q < end; q += TILE_OUTS) {
            states[q / TILE_OUTS] = State{splat(-__builtin_inff()), Floats{}, Ints{}, Ints{}};
            for (int64_t k = 0; k < in_tiles; ++k)
                pack_queries(q, min_of(end - q, TILE_OUTS), k);
        }
    }

    void take(const KeysAndValues<bfloat16>& head, int64_t base, const Range& needed,
              KeysAhead<bfloat16>& ahead) {
        for (int64_t g = needed.lo / TILE_INS * 2; g < div_up(needed.hi, TILE_INS) * 2; ++g) {
            const Range here = {max_of(needed.lo - g * TILE_ROWS, 0),
                                min_of(needed.hi - g * TILE_ROWS, TILE_ROWS)};
            const bool any = !here.empty();
            keys[g] = any ? rows_of(head.keys, base, g, here, copied_keys) : copied_keys;
            const bfloat16* rows =
                any ? rows_of(head.values, base, g, here, copied_values) : copied_values;
            pair_up(rows, here, g, ahead);
        }
    }

    void attend(int64_t q, int64_t end, int64_t base, KeysAhead<bfloat16>& ahead) {
        for (int64_t next; q < end; q = next) {
            next = min_of(end, (q / TILE_OUTS + 1) * TILE_OUTS);
            attend_columns(q, next, base, ahead);
        }
    }

    void finish(int64_t q, int64_t end) const {
        const __m512i in_order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        for (; q < end; ++q) {
            const float total = states[q / TILE_OUTS].total[q % TILE_OUTS];
            for (int64_t i = 0; i < head_dim; i += TILE_INS) {
                const float* from = out + q * head_dim + i;
                const __m512 low = (__m512)(load(from) / total);
                const __m512 high = (__m512)(load(from + LANES) / total);
                const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
                _mm512_storeu_si512(columns[q].out + i, _mm512_permutexvar_epi64(in_order, both));
            }
        }
    }

  private:
    uint32_t* query_tile(int64_t q, int64_t in_tile) const {
        return queries + (q / TILE_OUTS * in_tiles + in_tile) * TILE / 2;
    }

    void pack_queries(int64_t q, int64_t count, int64_t in_tile) {
        Floats pairs[LANES] = {};
        for (int64_t c = 0; c < count; ++c)
            std::memcpy(&pairs[c], columns[q + c].query + in_tile * TILE_INS, sizeof pairs[c]);
        transpose(pairs);
        std::memcpy(query_tile(q, in_tile), pairs, sizeof pairs);
    }

    // Sixteen rows of keys or values one behind the other: where they lie, or copied where blocks are not
    // made of sixteens. What keys beside `here` hold only enters scores that are masked.
    const bfloat16* rows_of(const PagedHead<bfloat16>& paged, int64_t base, int64_t g,
                            const Range& here, bfloat16* copied) const {
        const int64_t first = base + g * TILE_ROWS;
        if (paged.block_size % TILE_ROWS == 0) return paged.row(first);
        bfloat16* rows = copied + g * TILE_ROWS * head_dim;
        for (int64_t j = here.lo; j < here.hi; ++j)
            std::memcpy(rows + j * head_dim, paged.row(first + j), head_dim * sizeof(bfloat16));
        return rows;
    }

    // Sixteen rows of values, two side by side, with zeros for those that nobody sees. Within 32 values
    // the 16 of the first tile are the first fours of every eight, which is how the instruction pairs
    // them.
    INLINE_MEMBER void pair_up(const bfloat16* rows, const Range& here, int64_t g,
                               KeysAhead<bfloat16>& ahead) {
        bfloat16* to = values + g / 2 * TILE_INS * head_dim + g % 2 * TILE / 2;
        const __m512i none = _mm512_setzero_si512();
        for (int64_t j = 0; j < TILE_ROWS; j += 2, to += TILE_INS) {
            const bool even = j >= here.lo && j < here.hi, odd = j + 1 >= here.lo && j + 1 < here.hi;
            const bfloat16* row = rows + j * head_dim;
            bfloat16* pairs = to;
            for (int64_t i = 0; i < head_dim; i += TILE_INS, pairs += 2 * TILE) {
                const __m512i a = even ? _mm512_loadu_si512(row + i) : none;
                const __m512i b = odd ? _mm512_loadu_si512(row + head_dim + i) : none;
                _mm512_store_si512(pairs, _mm512_unpacklo_epi16(a, b));
                _mm512_store_si512(pairs + TILE, _mm512_unpackhi_epi16(a, b));
                ahead.fetch(PAIR_LINES);
            }
        }
    }

    // Columns q .. end - 1, which lie in one tile.
    void attend_columns(int64_t q, int64_t end, int64_t base, KeysAhead<bfloat16>& ahead) {
        const int64_t tile = q / TILE_OUTS * TILE_OUTS;
        State& state = states[q / TILE_OUTS];
        state.first = state.end = Ints{};  // columns of other sequences see none of these keys
        Range all = {KEYS, 0};
        for (int64_t r = q; r < end; ++r) {
            const Range range = visible(columns[r], base);
            if (range.empty()) continue;
            state.first[r - tile] = static_cast<int32_t>(range.lo);
            state.end[r - tile] = static_cast<int32_t>(range.hi);
            all = {min_of(all.lo, range.lo), max_of(all.hi, range.hi)};
        }
        if (all.empty()) return;
        const int64_t first = all.lo / TILE_INS, last = div_up(all.hi, TILE_INS);
        const int64_t groups = div_up(all.hi, TILE_ROWS);
        for (int64_t half = first; half < last; ++half)
            score(tile, half, 2 * half + 1 < groups, ahead);
        const Range passed = {first * TILE_INS, last * TILE_INS};
        const Floats factors = end - q <= FEW ? soften_few(state, q - tile, end - tile, passed)
                                              : soften_all(state, passed);
        for (int64_t i = 0; i < head_dim; i += TILE_INS)
            mix(q, end, i, first, last, factors, ahead);
    }

    // scores[j][c] = k_j . q_c for the 32 keys of a half, of which the second sixteen may be unseen
    void score(int64_t q, int64_t half, bool both, KeysAhead<bfloat16>& ahead) {
        const int64_t stride = head_dim * static_cast<int64_t>(sizeof(bfloat16));
        const bfloat16 *first = keys[2 * half], *second = keys[2 * half + both];
        memory_is_written();
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < in_tiles; ++k) {
            _tile_loadd(0, query_tile(q, k), TILE_BYTES);
            _tile_loadd(4, first + k * TILE_INS, stride);
            _tile_loadd(5, second + k * TILE_INS, stride);
            _tile_dpbf16ps(2, 4, 0);
            _tile_dpbf16ps(3, 5, 0);
            ahead.fetch(TILE_LINES);
        }
        _tile_stored(2, scores[half * TILE_INS], TILE_BYTES);
        _tile_stored(3, scores[half * TILE_INS + TILE_ROWS], TILE_BYTES);
    }

    // One online softmax step (arXiv:1805.02867): the scores of these keys, in whole halves, become
    // weights as rows of pairs, zero where a column does not see the key. Returns the factors for what
    // was summed before.
    Floats soften_all(State& state, const Range& passed) {
        const Floats unseen = splat(-__builtin_inff());
        Floats highest = state.highest;
        for (int64_t j = passed.lo; j < passed.hi; ++j) {
            const int32_t at = static_cast<int32_t>(j);
            const Ints seen = (state.first <= at) & (state.end > at);
            const Ints scaled = (Ints)(load(scores[j]) * step.scale);
            const Floats score = (Floats)((scaled & seen) | ((Ints)unseen & ~seen));
            store(scores[j], score);
            highest = maximum(highest, score);
        }
        const Floats top = top_of(highest);
        Floats parts[LANES / 2];
        for (int64_t i = 0; i < LANES / 2; ++i)
            parts[i] = weigh(i, passed, top) + weigh(i + LANES / 2, passed, top);
        for (int64_t half = passed.lo / TILE_INS; half < passed.hi / TILE_INS; ++half) turn(half);
        return renewed(state, highest, top, total(parts));
    }

    // A column that has seen no key yet has a highest of minus infinity, and weights of zero.
    static Floats top_of(Floats highest) {
        return (Floats)((Ints)highest & (highest > splat(-__builtin_inff())));
    }

    // The sum of the weights of every sixteenth key, which take their scores' places.
    INLINE_MEMBER Floats weigh(int64_t i, const Range& passed, Floats top) {
        Floats total = {};
        for (int64_t j = passed.lo + i; j < passed.hi; j += LANES) {
            const Floats weight = exp_nonpositive(load(scores[j]) - top);
            store(scores[j], weight);
            total += weight;
        }
        return total;
    }

    static Floats renewed(State& state, Floats highest, Floats top, Floats total) {
        const Floats factors = exp_nonpositive(state.highest - top);
        state.highest = highest;
        state.total = state.total * factors + total;
        return factors;
    }

    // The same for the columns q .. end - 1 of a tile alone, of which there are few.
    Floats soften_few(State& state, int64_t q, int64_t end, const Range& passed) {
        const int64_t turned = min_of(q, TILE_OUTS - FEW);
        for (int64_t j = passed.lo; j < passed.hi; j += LANES) turn_scores(j, turned);
        Floats highest = state.highest, total = {};
        for (int64_t c = q; c < end; ++c)
            highest[c] = highest_of(few_scores[c - turned], state.first[c], state.end[c], highest[c],
                                    passed);
        const Floats top = top_of(highest);
        for (int64_t c = q; c < end; ++c) total[c] = weigh_few(few_scores[c - turned], c, passed, top[c]);
        return renewed(state, highest, top, total);
    }

    // few_scores, of sixteen keys, from columns first .. first + FEW - 1 of scores
    INLINE_MEMBER void turn_scores(int64_t j, int64_t first) {
        __m512 rows[FEW];
        for (int64_t r = 0; r < FEW; ++r) {
            const auto part = [&](int64_t i) { return _mm_loadu_ps(&scores[j + 4 * i + r][first]); };
            rows[r] = _mm512_castps128_ps512(part(0));
            rows[r] = _mm512_insertf32x4(rows[r], part(1), 1);
            rows[r] = _mm512_insertf32x4(rows[r], part(2), 2);
            rows[r] = _mm512_insertf32x4(rows[r], part(3), 3);
        }
        const __m512d low01 = (__m512d)_mm512_unpacklo_ps(rows[0], rows[1]);
        const __m512d low23 = (__m512d)_mm512_unpacklo_ps(rows[2], rows[3]);
        const __m512d high01 = (__m512d)_mm512_unpackhi_ps(rows[0], rows[1]);
        const __m512d high23 = (__m512d)_mm512_unpackhi_ps(rows[2], rows[3]);
        store(few_scores[0] + j, (Floats)_mm512_unpacklo_pd(low01, low23));
        store(few_scores[1] + j, (Floats)_mm512_unpackhi_pd(low01, low23));
        store(few_scores[2] + j, (Floats)_mm512_unpacklo_pd(high01, high23));
        store(few_scores[3] + j, (Floats)_mm512_unpackhi_pd(high01, high23));
    }

    // The highest score of a column that sees keys first .. end - 1; the scores are scaled in passing.
    INLINE_MEMBER float highest_of(float* column, int32_t first, int32_t end, float before,
                                   const Range& passed) const {
        const Floats unseen = splat(-__builtin_inff());
        const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        Floats highest = splat(before);
        for (int64_t j = passed.lo; j < passed.hi; j += LANES) {
            const Ints at = lanes + static_cast<int32_t>(j);
            const Ints seen = (at >= first) & (at < end);
            const Ints scaled = (Ints)(load(column + j) * step.scale);
            const Floats score = (Floats)((scaled & seen) | ((Ints)unseen & ~seen));
            store(column + j, score);
            highest = maximum(highest, score);
        }
        return maximum(highest);
    }

    // The sum of a column's weights, which become its row of pairs.
    INLINE_MEMBER float weigh_few(const float* column, int64_t row, const Range& passed, float top) {
        Floats total = {};
        for (int64_t j = passed.lo; j < passed.hi; j += TILE_INS) {
            const Floats first = exp_nonpositive(load(column + j) - top);
            const Floats second = exp_nonpositive(load(column + j + LANES) - top);
            total += first;
            total += second;
            const Halves near[2] = {rounded(first), rounded(second)};
            const Halves rest[2] = {rounded(first - widened(near[0])),
                                    rounded(second - widened(near[1]))};
            std::memcpy(&weights[0][row][j / 2], near, sizeof near);
            std::memcpy(&weights[1][row][j / 2], rest, sizeof rest);
        }
        return sum(total);
    }

    // Weights of 32 keys as rows of pairs.
    void turn(int64_t half) {
        Floats nearest[LANES], rest[LANES];
        for (int64_t pair = 0; pair < LANES; ++pair) {
            const Floats even = load(scores[half * TILE_INS + 2 * pair]);
            const Floats odd = load(scores[half * TILE_INS + 2 * pair + 1]);
            const Words near = packed({{even, odd}});
            const Pack<bfloat16> kept = unpacked(near);
            nearest[pair] = (Floats)near;
            rest[pair] = (Floats)packed({{even - kept.part[0], odd - kept.part[1]}});
        }
        transpose(nearest);
        transpose(rest);
        for (int64_t r = 0; r < TILE_ROWS; ++r) {
            std::memcpy(&weights[0][r][half * TILE_ROWS], &nearest[r], sizeof nearest[r]);
            std::memcpy(&weights[1][r][half * TILE_ROWS], &rest[r], sizeof rest[r]);
        }
    }

    // out_c = factor_c out_c + sum_j weight_cj v_j for 32 of the values
    void mix(int64_t q, int64_t end, int64_t column, int64_t first, int64_t last,
             const Floats& factors, KeysAhead<bfloat16>& ahead) {
        constexpr int64_t stride = sizeof weights[0][0], sums_stride = sizeof sums[0];
        memory_is_written();
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t half = first; half < last; ++half) {
            const bfloat16* value = values + half * TILE_INS * head_dim + column * TILE_INS;
            _tile_loadd(0, &weights[0][0][half * TILE_ROWS], stride);
            _tile_loadd(1, &weights[1][0][half * TILE_ROWS], stride);
            _tile_loadd(4, value, TILE_BYTES);
            _tile_loadd(5, value + TILE, TILE_BYTES);
            _tile_dpbf16ps(2, 0, 4);
            _tile_dpbf16ps(3, 0, 5);
            _tile_dpbf16ps(2, 1, 4);
            _tile_dpbf16ps(3, 1, 5);
            ahead.fetch(TILE_LINES);
        }
        _tile_stored(2, sums[0], sums_stride);
        _tile_stored(3, sums[0] + TILE_OUTS, sums_stride);
        for (int64_t r = q; r < end; ++r) {
            const int64_t c = r % TILE_OUTS;
            const Floats factor = splat(factors[c]);
            for (int64_t i = 0; i < TILE_INS; i += LANES) {
                float* to = out + r * head_dim + column + i;
                store(to, load(to) * factor + load(sums[c] + i));
            }
        }
    }
};

#endif
