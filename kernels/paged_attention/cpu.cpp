// write_kv and paged_attention on the CPU. A unit of work is a KV head and some query rows with all heads
// that share it, its *columns*, so that each key and value is read once for them all: a tile of rows of
// one prompt, or decode rows of several sequences that share their first blocks and then go on alone.
// Keys pass in tiles of KEYS that begin at multiples of KEYS in the sequence, with one softmax step a
// tile. Neither depends on the unit, so a row's result has the same bits in a decode step and in any
// prefill chunk, whatever else is in the batch.
#include <algorithm>
#include <vector>

#include "../cpu/parallel.h"
#include "../cpu/program.h"
#include "matrix_tiles.h"
#include "vector_tiles.h"

namespace {

constexpr int64_t WRITE_ROWS = 64;  // of a task: fewer are not worth waking a thread

// Query rows start .. end - 1 of a sequence.
struct Rows {
    int64_t sequence, start, end;
    int64_t count() const { return end - start; }
};

// Members first .. last - 1, whose keys before `shared` are the same ones.
struct Group {
    int64_t first, last, shared;
};

// The step cut into groups; with each KV head, a group is a unit.
struct Work {
    std::vector<Rows> members;
    std::vector<Group> groups;
    int64_t max_rows = 0;  // of a group

    void add(int64_t count, int64_t shared) {
        const int64_t last = static_cast<int64_t>(members.size());
        int64_t rows = 0;
        for (int64_t i = last - count; i < last; ++i) rows += members[i].count();
        groups.push_back({last - count, last, shared});
        max_rows = max_of(max_rows, rows);
    }
};

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
void add_prompt(const Step<T>& step, int64_t sequence, int64_t max_columns, Work& work) {
    const int64_t rows = max_of(1, max_columns / step.group), q_len = step.q_len(sequence);
    for (int64_t tile = div_up(q_len, rows) - 1; tile >= 0; --tile) {
        work.members.push_back({sequence, tile * rows, min_of(q_len, (tile + 1) * rows)});
        work.add(1, 0);
    }
}

// Where a decode row's keys begin: equal for sequences that share their first block.
template <class T>
std::pair<int32_t, int32_t> beginning(const Step<T>& step, int64_t sequence) {
    const int32_t start = step.batch.context_starts[sequence];
    return {start, step.block_table(sequence)[start / step.cache.block_size]};
}

// Keys, in whole tiles, whose blocks are the same for all these sequences; the last key is each one's
// own.
template <class T>
int64_t shared_keys(const Step<T>& step, const int64_t* sequences, int64_t count) {
    const int32_t* table = step.block_table(sequences[0]);
    const auto blocks_of = [&](int64_t i) {
        return (step.batch.context_lens[sequences[i]] - 1) / step.cache.block_size;
    };
    int64_t blocks = blocks_of(0);
    for (int64_t i = 1; i < count; ++i) {
        const int64_t there = min_of(blocks, blocks_of(i));
        const int32_t first = step.batch.context_starts[sequences[0]] / step.cache.block_size;
        const int32_t* other = step.block_table(sequences[i]);
        for (blocks = min_of(first, there); blocks < there && other[blocks] == table[blocks];)
            ++blocks;
    }
    return blocks * step.cache.block_size / KEYS * KEYS;
}

// Decode rows with one beginning, in groups of equal size, as many as keep all threads busy.
template <class T>
void add_decodes(const Step<T>& step, const int64_t* sequences, int64_t count, int64_t sharing,
                 int64_t threads, Work& work) {
    const int64_t most = max_of(1, sharing / step.group);
    const int64_t wanted = div_up(2 * threads, step.cache.kv_heads);
    const int64_t groups = min_of(count, max_of(div_up(count, most), wanted));
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = count * group / groups, size = count * (group + 1) / groups - first;
        const int64_t shared = size > 1 ? shared_keys(step, sequences + first, size) : 0;
        for (int64_t i = first; i < first + size; ++i) {
            work.members.push_back({sequences[i], 0, 1});
            if (!shared) work.add(1, 0);
        }
        if (shared) work.add(size, shared);
    }
}

template <class T>
Work cut(const Step<T>& step, int64_t max_columns, int64_t sharing, int64_t threads) {
    Work work;
    std::vector<int64_t> decodes;
    for (int64_t i = 0; i < step.batch.sequences; ++i) {
        if (step.q_len(i) == 1) decodes.push_back(i);
        else add_prompt(step, i, max_columns, work);
    }
    std::stable_sort(decodes.begin(), decodes.end(), [&](int64_t a, int64_t b) {
        return beginning(step, a) < beginning(step, b);
    });
    const int64_t count = static_cast<int64_t>(decodes.size());
    for (int64_t first = 0, last; first < count; first = last) {
        for (last = first + 1; last < count && beginning(step, decodes[last]) ==
                                                   beginning(step, decodes[first]);)
            ++last;
        add_decodes(step, &decodes[first], last - first, sharing, threads, work);
    }
    return work;
}

// Columns q .. end - 1 of each head of a unit meet a tile of keys of one sequence, of which they see some
// of `needed`. The heads of a block lie side by side in memory, and so are read one after the other.
struct Visit {
    int64_t sequence, base, q, end;
    Range needed;
};

// A group with some heads. Its columns: head after head, those of each head beginning a tile of them.
template <class T>
struct Unit {
    int64_t number = -1, per_head = 0, stride = 0;
    Heads heads{};
    std::vector<Column<T>> columns;
    std::vector<Visit> visits;
};

template <class T>
void add_rows(const Step<T>& step, const Rows& member, int64_t kv_head, Column<T>* to) {
    const int64_t sequence = member.sequence, heads = step.cache.kv_heads * step.group;
    const int64_t before = step.batch.context_lens[sequence] - step.q_len(sequence);
    for (int64_t i = member.start; i < member.end; ++i) {
        const int64_t row = step.batch.cu_seqlens_q[sequence] + i, end = before + i + 1;
        const int64_t first = max_of(step.batch.context_starts[sequence], end - step.window);
        for (int64_t head = kv_head * step.group; head < (kv_head + 1) * step.group; ++head)
            *to++ = {step.query + row * step.row_stride + head * step.head_stride,
                     step.out + (row * heads + head) * step.cache.head_dim, first, end};
    }
}

template <class T>
void add_columns(const Step<T>& step, const Work& work, const Group& group, Unit<T>& unit) {
    const Heads& heads = unit.heads;
    unit.per_head = 0;
    for (int64_t i = group.first; i < group.last; ++i)
        unit.per_head += work.members[i].count() * step.group;
    unit.stride = div_up(unit.per_head, TILE_OUTS) * TILE_OUTS;
    unit.columns.resize((heads.last - heads.first) * unit.stride);
    Column<T>* to = unit.columns.data();
    for (int64_t head = heads.first; head < heads.last; ++head, to += unit.stride)
        for (int64_t i = group.first, q = 0; i < group.last; ++i) {
            add_rows(step, work.members[i], head, to + q);
            q += work.members[i].count() * step.group;
        }
}

// Columns q .. end of each head, of which `sequence` is one's, meet their keys among from .. to.
template <class T>
void add_visits(int64_t sequence, int64_t q, int64_t end, int64_t from, int64_t to, Unit<T>& unit) {
    int64_t first = unit.columns[q].first, last = 0;
    for (int64_t i = q; i < end; ++i) {
        first = min_of(first, unit.columns[i].first);
        last = max_of(last, unit.columns[i].end);
    }
    first = max_of(first, from);
    last = min_of(last, to);
    for (int64_t base = first / KEYS * KEYS; base < last; base += KEYS)
        unit.visits.push_back(
            {sequence, base, q, end, {max_of(first - base, 0), min_of(last - base, KEYS)}});
}

// First the keys that all members share, then each one's own.
template <class T>
void prepare(const Step<T>& step, const Work& work, const Group& group, const Heads& heads,
             Unit<T>& unit) {
    unit.heads = heads;
    add_columns(step, work, group, unit);
    add_visits(work.members[group.first].sequence, 0, unit.per_head, 0, group.shared, unit);
    for (int64_t i = group.first, q = 0; i < group.last; ++i) {
        const int64_t end = q + work.members[i].count() * step.group;
        add_visits(work.members[i].sequence, q, end, group.shared, unit.columns[end - 1].end,
                   unit);
        q = end;
    }
}

// What the visit after number i of this unit reads.
template <class T>
KeysAhead<T> ahead_of(const Step<T>& step, const Unit<T>& unit, size_t i, const Unit<T>& next) {
    const bool here = i + 1 < unit.visits.size();
    const Visit none{}, &visit = here                  ? unit.visits[i + 1]
                                 : next.visits.empty() ? none
                                                       : next.visits.front();
    return {step, visit.sequence, here ? unit.heads : next.heads, visit.base + visit.needed.lo,
            visit.base + visit.needed.hi};
}

template <class T, class Tiles>
void attend(const Step<T>& step, const Unit<T>& unit, const Unit<T>& next, Tiles& tiles) {
    const int64_t columns = static_cast<int64_t>(unit.columns.size());
    for (int64_t at = 0; at < columns; at += unit.stride)
        tiles.begin(unit.columns.data(), at, at + unit.per_head);
    for (size_t i = 0; i < unit.visits.size(); ++i) {
        const Visit& visit = unit.visits[i];
        KeysAhead<T> ahead = ahead_of(step, unit, i, next);
        for (int64_t head = unit.heads.first, at = 0; head < unit.heads.last; ++head) {
            tiles.take(KeysAndValues<T>(step, visit.sequence, head), visit.base, visit.needed, ahead);
            tiles.attend(at + visit.q, at + visit.end, visit.base, ahead);
            at += unit.stride;
        }
        ahead.fetch_all();
    }
    for (int64_t at = 0; at < columns; at += unit.stride)
        tiles.finish(at, at + unit.per_head);
}

// Where there are groups enough for all threads, a unit is a group with all heads. What it holds of a
// group must stay in the first cache levels, so that only small groups are computed like that.
template <class Tiles, class T>
void attend_all(const Step<T>& step, int64_t threads) {
    const Work work = cut(step, Tiles::MAX_COLUMNS, Tiles::SHARING, threads);
    const int64_t groups = static_cast<int64_t>(work.groups.size());
    const int64_t stride = div_up(work.max_rows * step.group, TILE_OUTS) * TILE_OUTS;
    const bool together = groups >= 2 * threads && step.cache.kv_heads * stride <= 2 * Tiles::MAX_COLUMNS;
    const int64_t heads = together ? step.cache.kv_heads : 1;
    const int64_t units = groups * (step.cache.kv_heads / heads);
    // Head by head: groups with the same first blocks follow one another.
    const auto make = [&](int64_t number, Unit<T>& unit) {
        unit.number = number;
        unit.visits.clear();
        if (number == units) return;
        const int64_t head = number / groups * heads;
        prepare(step, work, work.groups[number % groups], {head, head + heads}, unit);
    };
    share_tasks(units, threads, [&](Tasks& tasks) {
        Tiles tiles(step, heads * stride);
        Unit<T> now, next;
        tasks.each([&](int64_t number) {
            if (next.number == number) std::swap(now, next);
            else make(number, now);
            make(number + 1, next);
            attend(step, now, next, tiles);
        });
    });
}

const char* paged_attention(const Step<float>& step, int64_t threads) {
    if (const char* error = check(step)) return error;
    attend_all<VectorTiles<float>>(step, threads);
    return nullptr;
}

const char* paged_attention(const Step<bfloat16>& step, int64_t threads) {
    if (const char* error = check(step)) return error;
#ifdef HAS_AMX
    if (MatrixTiles::fit(step.cache)) {
        attend_all<MatrixTiles>(step, threads);
        return nullptr;
    }
#endif
    attend_all<VectorTiles<bfloat16>>(step, threads);
    return nullptr;
}

template <class T>
const char* write_kv(const T* keys, int64_t key_stride, const T* values, int64_t value_stride,
                     const Cache& cache, const int64_t* slots, int64_t rows, int64_t threads) {
    for (int64_t row = 0; row < rows; ++row)
        if (slots[row] < 0 || slots[row] >= cache.blocks * cache.block_size)
            return "slot_mapping names a slot outside the cache";
    const int64_t size = cache.head_dim, bytes = size * sizeof(T);
    const auto write = [&](int64_t row) {
        const int64_t block = slots[row] / cache.block_size, offset = slots[row] % cache.block_size;
        for (int64_t head = 0; head < cache.kv_heads; ++head) {
            const int64_t to = block * cache.block_stride + (head * cache.block_size + offset) * size;
            std::memcpy(static_cast<T*>(cache.keys) + to, keys + row * key_stride + head * size, bytes);
            std::memcpy(static_cast<T*>(cache.values) + to, values + row * value_stride + head * size,
                        bytes);
        }
    };
    for_each_task(div_up(rows, WRITE_ROWS), threads, [&](int64_t task) {
        for (int64_t row = task * WRITE_ROWS; row < min_of(rows, (task + 1) * WRITE_ROWS); ++row)
            write(row);
    });
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
                                            const int64_t* slots, int64_t rows, int64_t threads) { \
        return write_kv(static_cast<const T*>(key), key_stride, static_cast<const T*>(value),     \
                        value_stride, *cache, slots, rows, threads);                              \
    }                                                                                               \
    EXPORT_PACKED(paged_attention_##DTYPE)                                                          \
    EXPORT_PACKED(write_kv_##DTYPE)

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
