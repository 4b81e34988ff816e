// add_side_attention on the CPU. A unit of work is some rows of one segment and one KV head with all
// query heads that share it. For one row after the other, whose heads lie one behind the other:
//   scores = q K^T                     (heads, length) float32,
//   scores = w softmax(scale scores),
//   out   += scores V.
#include "../cpu/expand.h"
#include "../cpu/products.h"
#include "../cpu/program.h"
#include "../cpu/tables.h"

namespace {

constexpr int64_t BLOCK_ROWS = 16;
constexpr int64_t SERIAL_PRODUCTS = 1 << 16;  // below this, waking threads costs more than it saves

enum Field { LENGTH, KEYS, VALUES };

template <class T>
struct Call {
    T* out;
    const T* query;
    int64_t row_stride, rows, kv_heads, group, head_dim;  // group: query heads of one KV head
    float scale;
};

template <class T>
struct Unit {
    const T* keys;        // (length, head_dim), of the KV head
    Expansion<T> values;  // (length, head_dim)
    int64_t kv_head, start, end;
    float weight;
};

// Scores of one head fill whole vectors.
INLINE int64_t stride_of(int64_t length) { return div_up(length, LANES) * LANES; }

// scores = w softmax(scale scores). Not inlined: every path must round alike.
__attribute__((noinline)) void soften(float* scores, int64_t length, float scale, float weight) {
    constexpr float LOWEST = -__builtin_inff();
    const int64_t stride = stride_of(length);
    for_groups(length, LANES, [&](int64_t i, auto... n) {
        store(scores + i, load(scores + i, n...) * scale, n...);
    });
    for (int64_t i = length; i < stride; ++i) scores[i] = LOWEST;
    Floats top = splat(LOWEST);
    for (int64_t i = 0; i < stride; i += LANES) top = maximum(top, load(scores + i));
    const float highest = maximum(top);
    Floats sums = {};
    for (int64_t i = 0; i < stride; i += LANES) {
        const Floats e = exp_nonpositive(load(scores + i) - highest);
        store(scores + i, e);
        sums += e;
    }
    const float factor = weight / sum(sums);
    for (int64_t i = 0; i < stride; i += LANES) store(scores + i, load(scores + i) * factor);
}

template <class T>
void compute(const Call<T>& call, const Unit<T>& unit, float* own) {
    const int64_t length = unit.values.count, size = call.head_dim, group = call.group;
    const Matrix<float> scores{own, stride_of(length)};
    for (int64_t row = unit.start; row < unit.end; ++row) {
        const Matrix<const T> query{call.query + row * call.row_stride, size};
        const Matrix<T> out{call.out + row * call.kv_heads * group * size, size};
        dots(query.from(unit.kv_head * group), group, unit.keys, length, size, scores);
        for (int64_t head = 0; head < group; ++head)
            soften(scores.row(head), length, call.scale, unit.weight);
        expand_rows<false>(unit.values, scores, out.from(unit.kv_head * group), group, unit.weight);
    }
}

template <class T>
const char* add_side_attention(const Call<T>& call, const Table& table, int64_t place,
                               const Segments& segments, int64_t threads) {
    std::vector<Unit<T>> units;
    int64_t scratch = 0, products = 0;
    const auto add = [&](Cell<T>& cell, int64_t start, int64_t end, float weight) {
        const int64_t length = cell[LENGTH], head = length * call.head_dim;
        const T* keys = cell.numbers(KEYS, call.kv_heads, length, call.head_dim);
        const T* values = cell.numbers(VALUES, call.kv_heads, length, call.head_dim);
        if (cell.error || length == 0) return;
        scratch = max_of(scratch, call.group * stride_of(length));
        products += (end - start) * call.kv_heads * call.group * head;
        for (int64_t row = start; row < end; row += BLOCK_ROWS)
            for (int64_t i = 0; i < call.kv_heads; ++i)
                units.push_back({keys + i * head,
                                 {values + i * head, length, call.head_dim, nullptr, nullptr},
                                 i, row, min_of(end, row + BLOCK_ROWS), weight});
    };
    if (const char* error = for_each_cell<T>(table, place, segments, call.rows, add)) return error;
    return run_units(units, scratch, products < SERIAL_PRODUCTS ? 1 : threads,
                     [&](const Unit<T>& unit, float* own) {
                         compute(call, unit, own);
                         return static_cast<const char*>(nullptr);
                     });
}

}  // namespace

#define EXPORT(DTYPE, T)                                                                           \
    extern "C" const char* add_side_attention_##DTYPE(                                             \
        void* out, const void* query, int64_t row_stride, int64_t rows, int64_t kv_heads,          \
        int64_t group, int64_t head_dim, float scale, const Table* table, int64_t place,           \
        const Segments* segments, int64_t threads) {                                               \
        const Call<T> call{static_cast<T*>(out), static_cast<const T*>(query), row_stride, rows,   \
                           kv_heads, group, head_dim, scale};                                      \
        return add_side_attention(call, *table, place, *segments, threads);                        \
    }                                                                                              \
    EXPORT_PACKED(add_side_attention_##DTYPE)

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
