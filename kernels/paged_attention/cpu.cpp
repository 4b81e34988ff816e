// write_kv and paged_attention on the CPU. A unit of work is one sequence, one KV head and a tile
// of query rows with all heads that share it, so that each key and value is read once for them all.
// Keys pass in tiles of TILE that begin at multiples of TILE in the sequence; softmax is online
// (arXiv:1805.02867) with one step a tile. Neither depends on the query tile, so a row's result has
// the same bits in a decode step and in any prefill chunk, whatever else is in the batch.
#include <memory>
#include <vector>

#include "../cpu/parallel.h"
#include "../cpu/simd.h"

// Mirrored field by field in compiled.py; the meanings stand in op.py.
struct PagedBatch {
    const int32_t *cu_seqlens_q, *context_starts, *context_lens, *block_tables;
    int64_t sequences, max_blocks;
};

struct Cache {
    void *keys, *values;
    int64_t blocks, kv_heads, block_size, head_dim;
};

namespace {

constexpr int64_t TILE = 64;             // keys
constexpr int64_t GROUPS = TILE / LANES;
constexpr int64_t UNIT_QUERIES = 96;     // query rows x heads of one unit, about

// Register tile: ROWS queries x GROUPS vectors of keys or of value columns.
#ifdef __AVX512F__
constexpr int ROWS = 4;
#else
constexpr int ROWS = 2;
#endif

template <class T>
struct Step {
    const T* query;
    int64_t row_stride, head_stride, rows, group;  // group: query heads of one KV head
    T* out;
    const Cache& cache;
    const PagedBatch& batch;
    float scale;
    int64_t window;  // keys a row sees at most

    int64_t q_len(int64_t i) const { return batch.cu_seqlens_q[i + 1] - batch.cu_seqlens_q[i]; }
    const int32_t* block_table(int64_t i) const {
        return batch.block_tables + i * batch.max_blocks;
    }
};

struct Unit {
    int64_t sequence, kv_head, start, end;  // query rows of the sequence
};

struct alignas(64) CacheLine {
    float floats[LANES];
};

// Buffers of one thread, in float32. The elements of a head lie in the order of Pack<T>, with zeros
// up to `width`.
template <class T>
struct Scratch {
    int64_t width;
    std::unique_ptr<CacheLine[]> memory;
    float *queries, *keys, *values, *out, *total, *highest;

    Scratch(int64_t head_dim, int64_t max_queries)
        : width(div_up(head_dim, Pack<T>::SIZE) * Pack<T>::SIZE),
          memory(new CacheLine[(max_queries * (2 * width + LANES + 1) + 2 * TILE * width) / LANES +
                               1]),
          queries(memory[0].floats),
          keys(queries + max_queries * width),  // (width, TILE): transposed
          values(keys + TILE * width),          // (TILE, width)
          out(values + TILE * width),           // (queries, width), not yet divided by the total
          total(out + max_queries * width),     // (queries, LANES)
          highest(total + max_queries * LANES) {}
};

template <class T>
INLINE void unpack_head(const T* head, int64_t head_dim, float* to) {
    for_groups(head_dim, Pack<T>::SIZE, [&](int64_t i, auto... n) {
        const Pack<T> pack = load_pack(head + i, n...);
        for (int part = 0; part < Pack<T>::PARTS; ++part)
            store(to + i + part * LANES, pack.part[part]);
    });
}

// The keys or values of one sequence and KV head: row j is where the cache holds the one of key j.
template <class T>
struct PagedHead {
    const T* data;
    const int32_t* block_table;
    int64_t kv_head, kv_heads, block_size, head_dim;

    PagedHead(const void* data, const Step<T>& step, const Unit& unit)
        : data(static_cast<const T*>(data)), block_table(step.block_table(unit.sequence)),
          kv_head(unit.kv_head), kv_heads(step.cache.kv_heads), block_size(step.cache.block_size),
          head_dim(step.cache.head_dim) {}

    const T* row(int64_t j) const {
        const int64_t block = block_table[j / block_size];
        return data + ((block * kv_heads + kv_head) * block_size + j % block_size) * head_dim;
    }
};

// Keys lo .. hi of the tile that begins at `base`; the others of their groups become zero, unread.
template <class T>
void unpack_keys(const PagedHead<T>& keys, int64_t base, int64_t lo, int64_t hi, Scratch<T>& s) {
    float* rows = s.values;  // in passing: (LANES, width)
    for (int64_t g = lo / LANES * LANES; g < hi; g += LANES) {
        for (int64_t i = 0; i < LANES; ++i) {
            if (g + i >= lo && g + i < hi)
                unpack_head(keys.row(base + g + i), keys.head_dim, rows + i * s.width);
            else
                std::memset(rows + i * s.width, 0, s.width * sizeof(float));
        }
        for (int64_t column = 0; column < s.width; column += LANES) {
            Floats square[LANES];
            for (int64_t i = 0; i < LANES; ++i) square[i] = load(rows + i * s.width + column);
            transpose(square);
            for (int64_t i = 0; i < LANES; ++i) store(s.keys + (column + i) * TILE + g, square[i]);
        }
    }
}

template <class T>
void unpack_values(const PagedHead<T>& values, int64_t base, int64_t lo, int64_t hi,
                   Scratch<T>& s) {
    for (int64_t j = lo; j < hi; ++j)
        unpack_head(values.row(base + j), values.head_dim, s.values + j * s.width);
}

template <class T>
void unpack_queries(const Step<T>& step, const Unit& unit, Scratch<T>& s) {
    const int64_t first = step.batch.cu_seqlens_q[unit.sequence];
    for (int64_t q = 0; q < (unit.end - unit.start) * step.group; ++q) {
        const int64_t row = first + unit.start + q / step.group;
        const int64_t head = unit.kv_head * step.group + q % step.group;
        const T* from = step.query + row * step.row_stride + head * step.head_stride;
        unpack_head(from, step.cache.head_dim, s.queries + q * s.width);
    }
}

// scores[r][j] = q_r . k_j for the key groups begin .. end, G of them at a time
template <class T, int R, int G>
INLINE void score_groups(const Scratch<T>& s, int64_t q, int64_t g, float (*scores)[TILE]) {
    Floats acc[R][G] = {};
    const float* queries = s.queries + q * s.width;
    const float* keys = s.keys + g * LANES;
    for (int64_t i = 0; i < s.width; ++i, keys += TILE) {
        Floats key[G];
        for (int c = 0; c < G; ++c) key[c] = load(keys + c * LANES);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < G; ++c) acc[r][c] += queries[r * s.width + i] * key[c];
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < G; ++c) store(&scores[r][(g + c) * LANES], acc[r][c]);
}

template <class T, int R>
INLINE void score(const Scratch<T>& s, int64_t q, int64_t lo, int64_t hi, float (*scores)[TILE]) {
    int64_t g = lo / LANES;
    const int64_t end = div_up(hi, LANES);
    for (; g + GROUPS <= end; g += GROUPS) score_groups<T, R, GROUPS>(s, q, g, scores);
    for (; g < end; ++g) score_groups<T, R, 1>(s, q, g, scores);
}

// One online softmax step of one query over keys lo .. hi of a tile; scores of the other keys among
// begin .. end become weights of zero. Returns the factor for what was summed before. Not inlined:
// every path must round alike.
__attribute__((noinline)) float soften(float* scores, int64_t lo, int64_t hi, int64_t begin,
                                       int64_t end, float scale, float& highest, float* total) {
    constexpr float LOWEST = -__builtin_inff();
    const Ints iota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Floats top = splat(highest);
    for (int64_t j = begin; j < end; j += LANES) {
        const Ints at = iota + static_cast<int32_t>(j);
        const Ints visible = (at >= static_cast<int32_t>(lo)) & (at < static_cast<int32_t>(hi));
        const Ints scaled = (Ints)(load(scores + j) * scale);
        const Floats masked = (Floats)((scaled & visible) | ((Ints)splat(LOWEST) & ~visible));
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

// out_r = factor_r out_r + sum_j weight_rj v_j
template <class T, int R, int G>
INLINE void mix_columns(Scratch<T>& s, int64_t q, int64_t column, int64_t lo, int64_t hi,
                        const float (*weights)[TILE], const float* factors) {
    Floats acc[R][G] = {};
    const float* values = s.values + lo * s.width + column;
    for (int64_t j = lo; j < hi; ++j, values += s.width) {
        Floats value[G];
        for (int c = 0; c < G; ++c) value[c] = load(values + c * LANES);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < G; ++c) acc[r][c] += weights[r][j] * value[c];
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < G; ++c) {
            float* to = s.out + (q + r) * s.width + column + c * LANES;
            store(to, load(to) * factors[r] + acc[r][c]);
        }
}

template <class T, int R>
INLINE void mix(Scratch<T>& s, int64_t q, int64_t lo, int64_t hi, const float (*weights)[TILE],
                const float* factors) {
    int64_t column = 0;
    for (; column + GROUPS * LANES <= s.width; column += GROUPS * LANES)
        mix_columns<T, R, GROUPS>(s, q, column, lo, hi, weights, factors);
    for (; column < s.width; column += LANES)
        mix_columns<T, R, 1>(s, q, column, lo, hi, weights, factors);
}

struct Range {
    int64_t lo, hi;  // keys lo .. hi - 1 of the tile, none if hi <= lo
};

// R queries of the unit against the packed tile
template <class T, int R>
void attend_tile(const Step<T>& step, int64_t q, const Range* visible, Scratch<T>& s) {
    int64_t lo = TILE, hi = 0;
    for (int r = 0; r < R; ++r)
        if (visible[r].lo < visible[r].hi) {
            lo = min_of(lo, visible[r].lo);
            hi = max_of(hi, visible[r].hi);
        }
    if (lo >= hi) return;
    float scores[R][TILE], factors[R];
    score<T, R>(s, q, lo, hi, scores);
    const int64_t begin = lo / LANES * LANES, end = div_up(hi, LANES) * LANES;
    for (int r = 0; r < R; ++r) {
        if (visible[r].lo < visible[r].hi) {
            factors[r] = soften(scores[r], visible[r].lo, visible[r].hi, begin, end, step.scale,
                                s.highest[q + r], s.total + (q + r) * LANES);
        } else {
            factors[r] = 1.0f;
            std::memset(scores[r], 0, sizeof scores[r]);
        }
    }
    mix<T, R>(s, q, lo, hi, scores, factors);
}

template <class T>
void finish(const Step<T>& step, const Unit& unit, const Scratch<T>& s) {
    const int64_t first = step.batch.cu_seqlens_q[unit.sequence];
    const int64_t heads = step.cache.kv_heads * step.group, head_dim = step.cache.head_dim;
    for (int64_t q = 0; q < (unit.end - unit.start) * step.group; ++q) {
        const int64_t row = first + unit.start + q / step.group;
        const int64_t head = unit.kv_head * step.group + q % step.group;
        T* to = step.out + (row * heads + head) * head_dim;
        const float total = sum(load(s.total + q * LANES));
        for_groups(head_dim, Pack<T>::SIZE, [&](int64_t i, auto... n) {
            Pack<T> pack;
            for (int part = 0; part < Pack<T>::PARTS; ++part)
                pack.part[part] = load(s.out + q * s.width + i + part * LANES) / total;
            store_pack(to + i, pack, n...);
        });
    }
}

template <class T>
void attend(const Step<T>& step, const Unit& unit, Scratch<T>& s) {
    const PagedHead<T> keys(step.cache.keys, step, unit), values(step.cache.values, step, unit);
    const int64_t before = step.batch.context_lens[unit.sequence] - step.q_len(unit.sequence);
    const int64_t queries = (unit.end - unit.start) * step.group;
    const int64_t start = step.batch.context_starts[unit.sequence];
    const int64_t first = max_of(start, before + unit.start + 1 - step.window);
    const int64_t last = before + unit.end;  // one past

    unpack_queries(step, unit, s);
    std::memset(s.out, 0, queries * s.width * sizeof(float));
    std::memset(s.total, 0, queries * LANES * sizeof(float));
    for (int64_t q = 0; q < queries; ++q) s.highest[q] = -__builtin_inff();

    for (int64_t base = first / TILE * TILE; base < last; base += TILE) {
        const int64_t lo = max_of(first - base, 0), hi = min_of(last - base, TILE);
        unpack_keys(keys, base, lo, hi, s);
        unpack_values(values, base, lo, hi, s);
        const auto visible = [&](int64_t q) {
            const int64_t end = before + unit.start + q / step.group + 1;
            return Range{max_of(max_of(start, end - step.window) - base, 0),
                         min_of(end - base, TILE)};
        };
        int64_t q = 0;
        for (; q + ROWS <= queries; q += ROWS) {
            Range ranges[ROWS];
            for (int r = 0; r < ROWS; ++r) ranges[r] = visible(q + r);
            attend_tile<T, ROWS>(step, q, ranges, s);
        }
        Range ranges[ROWS] = {};
        for (int64_t r = 0; q + r < queries; ++r) ranges[r] = visible(q + r);
        switch (queries - q) {
            case 3: attend_tile<T, 3>(step, q, ranges, s); break;
            case 2: attend_tile<T, 2>(step, q, ranges, s); break;
            case 1: attend_tile<T, 1>(step, q, ranges, s); break;
        }
    }
    finish(step, unit, s);
}

// Every index the units will follow is looked at before anything is read through it.
template <class T>
const char* check(const Step<T>& step) {
    const PagedBatch& batch = step.batch;
    if (batch.cu_seqlens_q[0] != 0 || batch.cu_seqlens_q[batch.sequences] != step.rows)
        return "cu_seqlens_q does not run from 0 to the number of rows";
    for (int64_t i = 0; i < batch.sequences; ++i) {
        if (step.q_len(i) < 0) return "cu_seqlens_q descends";
        if (step.q_len(i) > batch.context_lens[i])
            return "a sequence has more query rows than context";
        if (batch.context_starts[i] < 0 ||
            batch.context_starts[i] > batch.context_lens[i] - step.q_len(i))
            return "a sequence's first key does not come before its query rows";
        const int64_t used = div_up(batch.context_lens[i], step.cache.block_size);
        if (used > batch.max_blocks) return "a context is longer than its block table";
        for (int64_t j = 0; j < used; ++j)
            if (step.block_table(i)[j] < 0 || step.block_table(i)[j] >= step.cache.blocks)
                return "a block table names a block outside the cache";
    }
    return nullptr;
}

// Within a sequence longest first: under the causal mask the last query tiles see the most keys.
template <class T>
std::vector<Unit> units_of(const Step<T>& step) {
    const int64_t rows = max_of(1, UNIT_QUERIES / step.group);
    std::vector<Unit> units;
    for (int64_t i = 0; i < step.batch.sequences; ++i) {
        const int64_t q_len = step.q_len(i);
        for (int64_t tile = div_up(q_len, rows) - 1; tile >= 0; --tile)
            for (int64_t head = 0; head < step.cache.kv_heads; ++head)
                units.push_back({i, head, tile * rows, min_of(q_len, (tile + 1) * rows)});
    }
    return units;
}

template <class T>
const char* paged_attention(const Step<T>& step, int64_t threads) {
    if (const char* error = check(step)) return error;
    const std::vector<Unit> units = units_of(step);
    int64_t rows = 0;
    for (const Unit& unit : units) rows = max_of(rows, unit.end - unit.start);
    const int64_t count = static_cast<int64_t>(units.size());
    std::atomic<int64_t> next{0};
    run_parallel(count > 1 ? threads : 1, [&] {
        Scratch<T> scratch(step.cache.head_dim, rows * step.group);
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
            attend(step, units[i], scratch);
    });
    return nullptr;
}

template <class T>
const char* write_kv(const T* keys, int64_t key_stride, const T* values, int64_t value_stride,
                     const Cache& cache, const int64_t* slots, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row)
        if (slots[row] < 0 || slots[row] >= cache.blocks * cache.block_size)
            return "slot_mapping names a slot outside the cache";
    const int64_t size = cache.head_dim, bytes = size * sizeof(T);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t block = slots[row] / cache.block_size, offset = slots[row] % cache.block_size;
        for (int64_t head = 0; head < cache.kv_heads; ++head) {
            const int64_t to = ((block * cache.kv_heads + head) * cache.block_size + offset) * size;
            std::memcpy(static_cast<T*>(cache.keys) + to, keys + row * key_stride + head * size, bytes);
            std::memcpy(static_cast<T*>(cache.values) + to, values + row * value_stride + head * size,
                        bytes);
        }
    }
    return nullptr;
}

}  // namespace

#define EXPORT(DTYPE, T)                                                                          \
    extern "C" const char* paged_attention_##DTYPE(                                               \
        const void* query, int64_t row_stride, int64_t head_stride, int64_t rows, int64_t group,  \
        void* out, const Cache* cache, const PagedBatch* batch, float scale, int64_t window,      \
        int64_t threads) {                                                                        \
        const Step<T> step{static_cast<const T*>(query), row_stride, head_stride, rows, group,    \
                           static_cast<T*>(out), *cache, *batch, scale, window};                  \
        return paged_attention(step, threads);                                                    \
    }                                                                                             \
    extern "C" const char* write_kv_##DTYPE(const void* key, int64_t key_stride, const void* value, \
                                            int64_t value_stride, const Cache* cache,             \
                                            const int64_t* slots, int64_t rows) {                 \
        return write_kv(static_cast<const T*>(key), key_stride, static_cast<const T*>(value),     \
                        value_stride, *cache, slots, rows);                                       \
    }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
