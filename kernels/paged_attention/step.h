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

// Asks for keys or values start .. end - 1 before they are needed: blocks of a sequence lie too far from
// each other for the processor to do it by itself.
template <class T>
INLINE void prefetch(const PagedHead<T>& paged, int64_t start, int64_t end) {
    const int64_t bytes = paged.head_dim * sizeof(T);
    for (int64_t j = start; j < end; ++j) {
        const char* row = reinterpret_cast<const char*>(paged.row(j));
        for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(row + i, 0, 2);
    }
}

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
