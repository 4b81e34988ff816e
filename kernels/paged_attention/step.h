// What attention computes on.
#pragma once

#include "../cpu/simd.h"

// Mirrored field by field in compiled.py; the meanings stand in op.py.
struct PagedBatch {
    const int32_t *cu_seqlens_q, *context_starts, *context_lens, *block_tables;
    int64_t sequences, max_blocks;
};

struct Cache {
    void *keys, *values;
    int64_t blocks, block_stride, kv_heads, block_size, head_dim;  // a stride in numbers
};

constexpr int64_t KEYS = 64;  // of a tile; tiles begin at multiples of it in the sequence
constexpr int64_t LINE = 64;  // bytes of a cache line

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

// The keys or values of one sequence and KV head: row j is where the cache holds the one of key j.
template <class T>
struct PagedHead {
    const T* data;
    const int32_t* block_table;
    int64_t block_stride, block_size, head_dim;

    PagedHead(const void* data, const Step<T>& step, int64_t sequence, int64_t kv_head)
        : data(static_cast<const T*>(data) +
               kv_head * step.cache.block_size * step.cache.head_dim),
          block_table(step.block_table(sequence)), block_stride(step.cache.block_stride),
          block_size(step.cache.block_size), head_dim(step.cache.head_dim) {}

    const T* row(int64_t j) const {
        const int64_t block = block_table[j / block_size];
        return data + block * block_stride + j % block_size * head_dim;
    }
};

// The keys and the values of one sequence and KV head.
template <class T>
struct KeysAndValues {
    PagedHead<T> keys, values;
    KeysAndValues(const Step<T>& step, int64_t sequence, int64_t kv_head)
        : keys(step.cache.keys, step, sequence, kv_head),
          values(step.cache.values, step, sequence, kv_head) {}
};

// Some of a step's KV heads.
struct Heads {
    int64_t first, last;
};

// Asks for keys start .. end - 1 of a sequence and their values before they are needed, a few lines at a
// time, in the order in which they lie in memory: blocks of a sequence lie too far from each other for
// the processor to do it by itself, and whoever asks for more lines than it can wait for waits itself.
template <class T>
class KeysAhead {
  public:
    KeysAhead(const Step<T>& step, int64_t sequence, const Heads& heads, int64_t start, int64_t end)
        : step(step), table(step.block_table(sequence)), heads(heads), head(heads.first), end(end),
          from(start), to(block_end(start)) {}

    INLINE_MEMBER void fetch(int64_t lines) {
        for (; lines > 0; --lines, at += LINE) {
            if (at >= until && !next_rows()) return;
            __builtin_prefetch(at, 0, 2);
        }
    }

    void fetch_all() { fetch(INT64_MAX); }

  private:
    const Step<T>& step;
    const int32_t* table;
    const Heads heads;
    int64_t head, end, from, to;  // keys from .. to - 1 lie in one block
    bool of_values = false;
    const char *at = nullptr, *until = nullptr;

    int64_t block_end(int64_t key) const {
        const int64_t size = step.cache.block_size;
        return min_of(end, (key / size + 1) * size);
    }

    // Of a head and block, they lie one behind the other.
    bool next_rows() {
        if (from >= end) return false;
        const Cache& cache = step.cache;
        const T* data = static_cast<const T*>(of_values ? cache.values : cache.keys);
        const int64_t row = head * cache.block_size + from % cache.block_size;
        const int64_t block = table[from / cache.block_size];
        at = reinterpret_cast<const char*>(data + block * cache.block_stride + row * cache.head_dim);
        until = at + (to - from) * cache.head_dim * static_cast<int64_t>(sizeof(T));
        if (++head < heads.last) return true;
        head = heads.first;
        of_values = !of_values;
        if (!of_values) {
            from = to;
            to = block_end(from);
        }
        return true;
    }
};

// One query row and head of a unit.
template <class T>
struct Column {
    const T* query;
    T* out;
    int64_t first, end;  // the keys it sees are first .. end - 1
};

// Keys of a tile: lo .. hi - 1, none if hi <= lo.
struct Range {
    int64_t lo, hi;
    bool empty() const { return lo >= hi; }
};

template <class T>
INLINE Range visible(const Column<T>& column, int64_t base) {
    return {max_of(column.first - base, 0), min_of(column.end - base, KEYS)};
}
