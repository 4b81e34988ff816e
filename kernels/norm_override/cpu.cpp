// override_norm on the CPU, one row at a time.
#include "../cpu/norm.h"
#include "../cpu/program.h"
#include "../cpu/tables.h"

namespace {

constexpr int64_t SERIAL_ELEMENTS = 1 << 15;  // below this, waking threads costs more than it saves
constexpr int64_t BLOCK_ROWS = 16;

enum Field { WEIGHT, BIAS };

// (rows, heads, size), dense in the last dimension
template <class T>
struct Heads {
    T* data;
    int64_t row_stride, head_stride;
    T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

template <class T>
struct Norm {
    Heads<T> y;
    Heads<const T> x;
    int64_t heads, size;
    float eps;
    bool centered;
};

template <class T>
struct Unit {
    const T *weight, *bias;
    int64_t start, end;
};

template <class T>
INLINE float sum_of(const T* x, int64_t size) {
    Floats acc = {};
    for_groups(size, LANES, [&](int64_t i, auto... n) { acc += load(x + i, n...); });
    return sum(acc);
}

// Lanes past n come out as zero.
INLINE Floats only(Floats v) { return v; }
INLINE Floats only(Floats v, int64_t n) {
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (Floats)((Ints)v & (lane < static_cast<int32_t>(n)));
}

template <class T>
INLINE float sum_of_squares_around(float mean, const T* x, int64_t size) {
    Floats acc = {};
    for_groups(size, LANES, [&](int64_t i, auto... n) {
        const Floats v = only(load(x + i, n...) - mean, n...);
        acc += v * v;
    });
    return sum(acc);
}

// Rounded once more after a bias, which no base's norm of this kind has.
template <class T>
void uncentered_row(const T* x, const Unit<T>& unit, T* y, int64_t size, float eps) {
    rms_row(x, unit.weight, y, size, eps, [&](Floats product, int64_t i, auto... n) {
        return unit.bias ? rounded<T>(product) + load(unit.bias + i, n...) : product;
    });
}

// Rounded once, like torch's layer_norm.
template <class T>
void centered_row(const T* x, const Unit<T>& unit, T* y, int64_t size, float eps) {
    const float mean = sum_of(x, size) / size;
    const float scale = 1.0f / __builtin_sqrtf(sum_of_squares_around(mean, x, size) / size + eps);
    for_groups(size, LANES, [&](int64_t i, auto... n) {
        Floats result = (load(x + i, n...) - mean) * scale * load(unit.weight + i, n...);
        if (unit.bias) result += load(unit.bias + i, n...);
        store(y + i, result, n...);
    });
}

template <class T>
void compute(const Norm<T>& norm, const Unit<T>& unit) {
    for (int64_t row = unit.start; row < unit.end; ++row)
        for (int64_t head = 0; head < norm.heads; ++head) {
            const T* x = norm.x.at(row, head);
            T* y = norm.y.at(row, head);
            if (norm.centered) centered_row(x, unit, y, norm.size, norm.eps);
            else uncentered_row(x, unit, y, norm.size, norm.eps);
        }
}

template <class T>
const char* override_norm(const Norm<T>& norm, int64_t rows, const Table& table, int64_t place,
                          const Segments& segments, int64_t threads) {
    std::vector<Unit<T>> units;
    int64_t elements = 0;
    const auto add = [&](Cell<T>& cell, int64_t start, int64_t end, float) {
        const T* weight = cell.numbers(WEIGHT, norm.size);
        const T* bias = cell.optional_numbers(BIAS, norm.size);
        elements += (end - start) * norm.heads * norm.size;
        for (int64_t row = start; row < end; row += BLOCK_ROWS)
            units.push_back({weight, bias, row, min_of(end, row + BLOCK_ROWS)});
    };
    if (const char* error = for_each_cell<T>(table, place, segments, rows, add)) return error;
    return run_units(units, 0, elements < SERIAL_ELEMENTS ? 1 : threads,
                     [&](const Unit<T>& unit, float*) {
                         compute(norm, unit);
                         return static_cast<const char*>(nullptr);
                     });
}

}  // namespace

#define EXPORT(DTYPE, T)                                                                           \
    extern "C" const char* override_norm_##DTYPE(                                                  \
        void* y, const void* x, int64_t row_stride, int64_t head_stride, int64_t rows,             \
        int64_t heads, int64_t size, float eps, int64_t centered, const Table* table,              \
        int64_t place, const Segments* segments, int64_t threads) {                                \
        const Norm<T> norm{{static_cast<T*>(y), heads * size, size},                               \
                           {static_cast<const T*>(x), row_stride, head_stride},                    \
                           heads, size, eps, centered != 0};                                       \
        return override_norm(norm, rows, *table, place, *segments, threads);                       \
    }                                                                                              \
    EXPORT_PACKED(override_norm_##DTYPE)

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
