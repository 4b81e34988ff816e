// Attention on the processor's vector units: a tile's keys and values are unpacked to float32 once and
// meet all columns of the unit from there.
#pragma once

#include <memory>

#include "step.h"

// Register tile: ROWS queries x GROUPS vectors of keys or of value columns.
constexpr int64_t GROUPS = KEYS / LANES;
#ifdef __AVX512F__
constexpr int ROWS = 4;
#else
constexpr int ROWS = 2;
#endif

// One online softmax step (arXiv:1805.02867) of one query over the visible keys of a tile: scores become
// weights, those of the other keys among begin .. end zero. Returns the factor for what was summed
// before. Not inlined: every path must round alike.
__attribute__((noinline)) inline float soften(float* scores, const Range& visible, int64_t begin,
                                              int64_t end, float scale, float& highest,
                                              float* total) {
    constexpr float LOWEST = -__builtin_inff();
    const Ints iota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int32_t lo = static_cast<int32_t>(visible.lo), hi = static_cast<int32_t>(visible.hi);
    Floats top = splat(highest);
    for (int64_t j = begin; j < end; j += LANES) {
        const Ints at = iota + static_cast<int32_t>(j);
        const Ints seen = (at >= lo) & (at < hi);
        const Ints scaled = (Ints)(load(scores + j) * scale);
        const Floats masked = (Floats)((scaled & seen) | ((Ints)splat(LOWEST) & ~seen));
        store(scores + j, masked);
        top = maximum(top, masked);
    }
    const float before = highest;
    highest = maximum(top);
    Floats sums = {};
    for (int64_t j = begin; j < end; j += LANES) {
        const Floats weight = exp_nonpositive(load(scores + j) - highest);
        store(scores + j, weight);
        sums += weight;
    }
    const float factor = exp_nonpositive(splat(before - highest))[0];
    store(total, load(total) * factor + sums);
    return factor;
}

template <class T>
class VectorTiles {
    using Weights = float[KEYS];

    struct alignas(64) CacheLine {
        float floats[LANES];
    };

    const Step<T>& step;
    // The elements of a head lie in the order of Pack<T>, with zeros up to `width`.
    int64_t width;
    std::unique_ptr<CacheLine[]> memory;
    float *queries, *keys, *values, *out, *total, *highest;
    const Column<T>* columns = nullptr;

  public:
    static constexpr int64_t MAX_COLUMNS = 96;  // of a unit, about
    static constexpr int64_t SHARING = 2 * ROWS;  // columns that are worth sharing a tile

    VectorTiles(const Step<T>& step, int64_t max_columns)
        : step(step), width(div_up(step.cache.head_dim, Pack<T>::SIZE) * Pack<T>::SIZE),
          memory(new CacheLine[(max_columns * (2 * width + LANES + 1) + 2 * KEYS * width) / LANES +
                               1]),
          queries(memory[0].floats),
          keys(queries + max_columns * width),  // (width, KEYS): transposed
          values(keys + KEYS * width),          // (KEYS, width)
          out(values + KEYS * width),           // (columns, width), not yet divided by the total
          total(out + max_columns * width),     // (columns, LANES)
          highest(total + max_columns * LANES) {}

    // Columns q .. end - 1 of the unit have seen nothing yet.
    void begin(const Column<T>* unit, int64_t q, int64_t end) {
        columns = unit;
        std::memset(out + q * width, 0, (end - q) * width * sizeof(float));
        std::memset(total + q * LANES, 0, (end - q) * LANES * sizeof(float));
        for (; q < end; ++q) {
            unpack_head(columns[q].query, step.cache.head_dim, queries + q * width);
            highest[q] = -__builtin_inff();
        }
    }

    // Keys lo .. hi of the tile that begins at `base`; those beside them count as zero, unread.
    void take(const KeysAndValues<T>& head, int64_t base, const Range& needed, KeysAhead<T>& ahead) {
        ahead.fetch_all();
        unpack_keys(head.keys, base, needed);
        for (int64_t j = needed.lo; j < needed.hi; ++j)
            unpack_head(head.values.row(base + j), head.values.head_dim, values + j * width);
    }

    // Columns q .. end against the tile taken last.
    void attend(int64_t q, int64_t end, int64_t base, KeysAhead<T>&) {
        for (; q + ROWS <= end; q += ROWS) attend_rows<ROWS>(q, base);
        switch (end - q) {
            case 3: attend_rows<3>(q, base); break;
            case 2: attend_rows<2>(q, base); break;
            case 1: attend_rows<1>(q, base); break;
        }
    }

    void finish(int64_t q, int64_t end) const {
        for (; q < end; ++q) {
            const float whole = sum(load(total + q * LANES));
            for_groups(step.cache.head_dim, Pack<T>::SIZE, [&](int64_t i, auto... n) {
                Pack<T> pack;
                for (int part = 0; part < Pack<T>::PARTS; ++part)
                    pack.part[part] = load(out + q * width + i + part * LANES) / whole;
                store_pack(columns[q].out + i, pack, n...);
            });
        }
    }

  private:
    static void unpack_head(const T* head, int64_t head_dim, float* to) {
        for_groups(head_dim, Pack<T>::SIZE, [&](int64_t i, auto... n) {
            const Pack<T> pack = load_pack(head + i, n...);
            for (int part = 0; part < Pack<T>::PARTS; ++part)
                store(to + i + part * LANES, pack.part[part]);
        });
    }

    void unpack_keys(const PagedHead<T>& paged, int64_t base, const Range& needed) {
        float* rows = values;  // in passing: (LANES, width)
        for (int64_t g = needed.lo / LANES * LANES; g < needed.hi; g += LANES) {
            for (int64_t i = 0; i < LANES; ++i) {
                if (g + i >= needed.lo && g + i < needed.hi)
                    unpack_head(paged.row(base + g + i), paged.head_dim, rows + i * width);
                else
                    std::memset(rows + i * width, 0, width * sizeof(float));
            }
            for (int64_t column = 0; column < width; column += LANES) {
                Floats square[LANES];
                for (int64_t i = 0; i < LANES; ++i) square[i] = load(rows + i * width + column);
                transpose(square);
                for (int64_t i = 0; i < LANES; ++i)
                    store(keys + (column + i) * KEYS + g, square[i]);
            }
        }
    }

    template <int R>
    void attend_rows(int64_t q, int64_t base) {
        Range ranges[R], all = {KEYS, 0};
        for (int r = 0; r < R; ++r) {
            ranges[r] = visible(columns[q + r], base);
            if (ranges[r].empty()) continue;
            all = {min_of(all.lo, ranges[r].lo), max_of(all.hi, ranges[r].hi)};
        }
        if (all.empty()) return;
        float scores[R][KEYS], factors[R];
        score<R>(q, all, scores);
        const int64_t begin = all.lo / LANES * LANES, end = div_up(all.hi, LANES) * LANES;
        for (int r = 0; r < R; ++r) {
            if (ranges[r].empty()) {
                factors[r] = 1.0f;
                std::memset(scores[r], 0, sizeof scores[r]);
            } else {
                factors[r] = soften(scores[r], ranges[r], begin, end, step.scale, highest[q + r],
                                    total + (q + r) * LANES);
            }
        }
        mix<R>(q, all, scores, factors);
    }

    // scores[r][j] = q_r . k_j
    template <int R>
    INLINE_MEMBER void score(int64_t q, const Range& all, Weights* scores) const {
        int64_t g = all.lo / LANES;
        const int64_t end = div_up(all.hi, LANES);
        for (; g + GROUPS <= end; g += GROUPS) score_groups<R, GROUPS>(q, g, scores);
        for (; g < end; ++g) score_groups<R, 1>(q, g, scores);
    }

    template <int R, int G>
    INLINE_MEMBER void score_groups(int64_t q, int64_t g, Weights* scores) const {
        Floats acc[R][G] = {};
        const float *query = queries + q * width, *key_groups = keys + g * LANES;
        for (int64_t i = 0; i < width; ++i, key_groups += KEYS) {
            Floats key[G];
            for (int c = 0; c < G; ++c) key[c] = load(key_groups + c * LANES);
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < G; ++c) acc[r][c] += query[r * width + i] * key[c];
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < G; ++c) store(&scores[r][(g + c) * LANES], acc[r][c]);
    }

    // out_r = factor_r out_r + sum_j weight_rj v_j
    template <int R>
    INLINE_MEMBER void mix(int64_t q, const Range& all, const Weights* weights,
                           const float* factors) {
        int64_t column = 0;
        for (; column + GROUPS * LANES <= width; column += GROUPS * LANES)
            mix_columns<R, GROUPS>(q, column, all, weights, factors);
        for (; column < width; column += LANES)
            mix_columns<R, 1>(q, column, all, weights, factors);
    }

    template <int R, int G>
    INLINE_MEMBER void mix_columns(int64_t q, int64_t column, const Range& all,
                                   const Weights* weights, const float* factors) {
        Floats acc[R][G] = {};
        const float* from = values + all.lo * width + column;
        for (int64_t j = all.lo; j < all.hi; ++j, from += width) {
            Floats value[G];
            for (int c = 0; c < G; ++c) value[c] = load(from + c * LANES);
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < G; ++c) acc[r][c] += weights[r][j] * value[c];
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < G; ++c) {
                float* to = out + (q + r) * width + column + c * LANES;
                store(to, load(to) * factors[r] + acc[r][c]);
            }
    }
};
