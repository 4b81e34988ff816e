// rms_norm and add_rms_norm on the CPU, one pass over memory and one row at a time.
#include "../cpu/norm.h"
#include "../cpu/parallel.h"
#include "../cpu/program.h"

namespace {

constexpr int64_t SERIAL_ELEMENTS = 1 << 15;  // below this, waking threads costs more than it saves
constexpr int64_t TASK_ROWS = 16;

template <class T>
void normalize_row(const T* x, const T* weight, T* y, int64_t size, float eps) {
    rms_row(x, weight, y, size, eps, [](Floats product, auto...) { return product; });
}

template <class T>
void add_row(T* residual, const T* x, int64_t size) {
    for_groups(size, LANES, [&](int64_t i, auto... n) {
        store(residual + i, load(residual + i, n...) + load(x + i, n...), n...);
    });
}

template <class Body>
void for_each_row(int64_t rows, int64_t size, int64_t threads, Body body) {
    const int64_t usable = rows * size < SERIAL_ELEMENTS ? 1 : threads;
    for_each_task(div_up(rows, TASK_ROWS), usable, [&](int64_t task) {
        const int64_t end = min_of(rows, (task + 1) * TASK_ROWS);
        for (int64_t row = task * TASK_ROWS; row < end; ++row) body(row);
    });
}

template <class T>
void rms_norm(const void* x, int64_t row_stride, int64_t head_stride, const void* weight, void* y,
              int64_t rows, int64_t heads, int64_t size, float eps, int64_t threads) {
    for_each_row(rows * heads, size, threads, [=](int64_t i) {
        const int64_t from = i / heads * row_stride + i % heads * head_stride;
        normalize_row(static_cast<const T*>(x) + from, static_cast<const T*>(weight),
                      static_cast<T*>(y) + i * size, size, eps);
    });
}

template <class T>
void add_rms_norm(const void* x, int64_t x_stride, void* residual, int64_t residual_stride,
                  const void* weight, void* y, int64_t rows, int64_t size, float eps,
                  int64_t threads) {
    for_each_row(rows, size, threads, [=](int64_t i) {
        T* sum = static_cast<T*>(residual) + i * residual_stride;
        add_row(sum, static_cast<const T*>(x) + i * x_stride, size);
        normalize_row(sum, static_cast<const T*>(weight), static_cast<T*>(y) + i * size, size, eps);
    });
}

}  // namespace

#define EXPORT(DTYPE, T)                                                                         \
    extern "C" const char* rms_norm_##DTYPE(const void* x, int64_t row_stride,                   \
                                            int64_t head_stride, const void* weight, void* y,    \
                                            int64_t rows, int64_t heads, int64_t size, float eps, \
                                            int64_t threads) {                                   \
        rms_norm<T>(x, row_stride, head_stride, weight, y, rows, heads, size, eps, threads);     \
        return nullptr;                                                                          \
    }                                                                                            \
    extern "C" const char* add_rms_norm_##DTYPE(const void* x, int64_t x_stride, void* residual, \
                                                int64_t residual_stride, const void* weight,     \
                                                void* y, int64_t rows, int64_t size, float eps,  \
                                                int64_t threads) {                               \
        add_rms_norm<T>(x, x_stride, residual, residual_stride, weight, y, rows, size, eps,      \
                        threads);                                                                \
        return nullptr;                                                                          \
    }                                                                                             \
    EXPORT_PACKED(rms_norm_##DTYPE)                                                               \
    EXPORT_PACKED(add_rms_norm_##DTYPE)

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
