// add_low_rank on the CPU. A unit of work is up to BLOCK_ROWS rows of one segment and one target:
//   shrink  h = x A^T   (rows, rank) float32, stays in the first cache level,
//   expand  y += h B + c.
// Every (row, rank) and every (row, column) has one accumulator that runs over its sum in order, so
// a row's result has the same bits in a segment of one row and in one of a thousand.
#include <memory>
#include <vector>

#include "../cpu/parallel.h"
#include "../cpu/simd.h"

namespace {

constexpr int64_t BLOCK_ROWS = 32;

// Register tiles: ROWS x COLS sums for blocks of rows, 1 x WIDE for single rows.
#ifdef __AVX512F__
constexpr int ROWS = 4, COLS = 4, WIDE = 8;
#else
constexpr int ROWS = 2, COLS = 2, WIDE = 4;
#endif

template <class T>
struct Matrix {
    T* data;
    int64_t stride;
    T* row(int64_t i) const { return data + i * stride; }
    Matrix from(int64_t i, int64_t column = 0) const { return {row(i) + column, stride}; }
};

template <class T>
struct Unit {
    Matrix<T> y;
    Matrix<const T> x;
    int64_t rows, rank, in_size, out_size;
    const T *a, *b, *bias;
};

template <int R, int C, class T>
INLINE void shrink_tile(Matrix<const T> x, const T* a, int64_t size, Matrix<float> h) {
    using P = Pack<T>;
    Floats acc[R][C] = {};
    for_groups(size, P::SIZE, [&](int64_t k, auto... n) {
        P weights[C];
        for (int c = 0; c < C; ++c) weights[c] = load_pack(a + c * size + k, n...);
        for (int r = 0; r < R; ++r) {
            const P input = load_pack(x.row(r) + k, n...);
            for (int part = 0; part < P::PARTS; ++part)
                for (int c = 0; c < C; ++c) acc[r][c] += input.part[part] * weights[c].part[part];
        }
    });
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) h.row(r)[c] = sum(acc[r][c]);
}

// C rank rows of A stay in the first cache level while all rows of the unit pass.
template <int R, int C, class T>
void shrink_ranks(const Unit<T>& unit, int64_t rank, Matrix<float> h) {
    const T* a = unit.a + rank * unit.in_size;
    int64_t row = 0;
    for (; row + R <= unit.rows; row += R)
        shrink_tile<R, C>(unit.x.from(row), a, unit.in_size, h.from(row, rank));
    for (; row < unit.rows; ++row)
        shrink_tile<1, C>(unit.x.from(row), a, unit.in_size, h.from(row, rank));
}

template <int R, int C, class T>
void shrink(const Unit<T>& unit, Matrix<float> h) {
    int64_t rank = 0;
    for (; rank + C <= unit.rank; rank += C) shrink_ranks<R, C>(unit, rank, h);
    for (; rank < unit.rank; ++rank) shrink_ranks<R, 1>(unit, rank, h);
}

// C packs of columns; n, where given, is how many columns there are of a single one
template <int R, int C, class T, class... N>
INLINE void expand_tile(const Unit<T>& unit, Matrix<float> h, Matrix<T> y, int64_t column, N... n) {
    using P = Pack<T>;
    P acc[R][C] = {};
    const T* b = unit.b + column;
    for (int64_t k = 0; k < unit.rank; ++k, b += unit.out_size) {
        P weights[C];
        for (int c = 0; c < C; ++c) weights[c] = load_pack(b + c * P::SIZE, n...);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c)
                for (int part = 0; part < P::PARTS; ++part)
                    acc[r][c].part[part] += h.row(r)[k] * weights[c].part[part];
    }
    for (int c = 0; c < C; ++c) {
        const int64_t at = column + c * P::SIZE;
        const P bias = unit.bias ? load_pack(unit.bias + at, n...) : P{};
        for (int r = 0; r < R; ++r) {
            P sum = load_pack(y.row(r) + at, n...);
            for (int part = 0; part < P::PARTS; ++part)
                sum.part[part] += acc[r][c].part[part] + bias.part[part];
            store_pack(y.row(r) + at, sum, n...);
        }
    }
}

// A strip of B's columns stays in the first cache level while all rows of the unit pass.
template <int R, int C, class T, class... N>
INLINE void expand_columns(const Unit<T>& unit, Matrix<float> h, int64_t column, N... n) {
    int64_t row = 0;
    for (; row + R <= unit.rows; row += R)
        expand_tile<R, C>(unit, h.from(row), unit.y.from(row), column, n...);
    for (; row < unit.rows; ++row)
        expand_tile<1, C>(unit, h.from(row), unit.y.from(row), column, n...);
}

template <int R, int C, class T>
void expand(const Unit<T>& unit, Matrix<float> h) {
    constexpr int PACKS = C / Pack<T>::PARTS;
    constexpr int64_t STRIP = PACKS * Pack<T>::SIZE;
    const int64_t strips = unit.out_size / STRIP * STRIP;
    for (int64_t column = 0; column < strips; column += STRIP)
        expand_columns<R, PACKS>(unit, h, column);
    for_groups(unit.out_size - strips, Pack<T>::SIZE, [&](int64_t i, auto... n) {
        expand_columns<R, 1>(unit, h, strips + i, n...);
    });
}

template <int R, int C, class T>
void correct_tiled(const Unit<T>& unit, float* scratch) {
    const Matrix<float> h{scratch, unit.rank};
    shrink<R, C>(unit, h);
    expand<R, C>(unit, h);
}

template <class T>
void correct(const Unit<T>& unit, float* scratch) {
    if (unit.rows < ROWS) correct_tiled<1, WIDE>(unit, scratch);
    else correct_tiled<ROWS, COLS>(unit, scratch);
}

}  // namespace

// Mirrored field by field in compiled.py; the meanings stand in op.py.
struct LowRankTable {
    const void* pool;
    int64_t pool_size, targets, slots;
    const int32_t* rank;
    const int64_t *a_offset, *b_offset, *bias_offset;
};

struct SiteTargets {
    int64_t first, count;
    const int64_t *out_starts, *out_sizes;
};

struct Segments {
    int64_t count;
    const int32_t *start, *end, *adapter_slot;
};

namespace {

INLINE bool inside(int64_t offset, int64_t count, int64_t size) {
    return offset >= 0 && count >= 0 && offset <= size - count;
}

template <class T>
struct Call {
    Matrix<T> y;
    Matrix<const T> x;
    int64_t rows, in_size, out_size;
    const LowRankTable& table;
    const SiteTargets& targets;
    std::vector<Unit<T>> units{};
    int64_t max_rank = 0;

    const char* add_segment(int64_t start, int64_t end, int64_t slot) {
        if (!inside(start, end - start, rows)) return "a segment reaches outside the batch's rows";
        if (slot < 0 || slot >= table.slots)
            return "a segment names an adapter slot outside the table";
        for (int64_t t = 0; t < targets.count; ++t)
            if (const char* error = add_target(start, end, slot, t)) return error;
        return nullptr;
    }

    const char* add_target(int64_t start, int64_t end, int64_t slot, int64_t t) {
        const int64_t cell = (targets.first + t) * table.slots + slot;
        const int64_t column = targets.out_starts[t], width = targets.out_sizes[t];
        const int64_t rank = table.rank[cell], bias_at = table.bias_offset[cell];
        if (rank == 0 && bias_at < 0) return nullptr;
        if (!inside(column, width, out_size))
            return "a target reaches outside the output's columns";
        const int64_t a_at = rank ? table.a_offset[cell] : 0;
        const int64_t b_at = rank ? table.b_offset[cell] : 0;
        if (!inside(a_at, rank * in_size, table.pool_size) ||
            !inside(b_at, rank * width, table.pool_size) ||
            (bias_at >= 0 && !inside(bias_at, width, table.pool_size)))
            return "an adapter's weights reach outside the pool";
        const T* pool = static_cast<const T*>(table.pool);
        const T* bias = bias_at >= 0 ? pool + bias_at : nullptr;
        for (int64_t row = start; row < end; row += BLOCK_ROWS)
            units.push_back({{y.row(row) + column, y.stride},
                             {x.row(row), x.stride},
                             min_of(BLOCK_ROWS, end - row), rank, in_size, width,
                             pool + a_at, pool + b_at, bias});
        max_rank = max_of(max_rank, rank);
        return nullptr;
    }

    void run(int64_t threads) const {
        std::atomic<int64_t> next{0};
        const int64_t count = static_cast<int64_t>(units.size());
        run_parallel(count > 1 ? threads : 1, [&] {
            const std::unique_ptr<float[]> scratch(new float[BLOCK_ROWS * max_rank]);
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
                correct(units[i], scratch.get());
        });
    }
};

template <class T>
const char* add_low_rank(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t rows,
                         int64_t in_size, int64_t out_size, const LowRankTable* table,
                         const SiteTargets* targets, const Segments* segments, int64_t threads) {
    Call<T> call{{static_cast<T*>(y), y_stride},
                 {static_cast<const T*>(x), x_stride},
                 rows, in_size, out_size, *table, *targets};
    for (int64_t i = 0; i < segments->count; ++i)
        if (const char* error = call.add_segment(segments->start[i], segments->end[i],
                                                 segments->adapter_slot[i]))
            return error;
    call.run(threads);
    return nullptr;
}

}  // namespace

#define EXPORT(NAME, T)                                                                         \
    extern "C" const char* NAME(void* y, int64_t y_stride, const void* x, int64_t x_stride,     \
                                int64_t rows, int64_t in_size, int64_t out_size,                \
                                const LowRankTable* table, const SiteTargets* targets,          \
                                const Segments* segments, int64_t threads) {                    \
        return add_low_rank<T>(y, y_stride, x, x_stride, rows, in_size, out_size, table, targets, \
                               segments, threads);                                              \
    }

EXPORT(add_low_rank_float32, float)
EXPORT(add_low_rank_bfloat16, bfloat16)
