// rotary on the CPU, in place.
#include "../cpu/parallel.h"
#include "../cpu/program.h"
#include "../cpu/simd.h"

namespace {

constexpr int64_t SERIAL_ELEMENTS = 1 << 15;  // below this, waking threads costs more than it saves
constexpr int64_t TASK_ROWS = 16;

template <class T>
void rotate_head(T* first, const float* cos, const float* sin, int64_t half) {
    T* second = first + half;
    for_groups(half, LANES, [&](int64_t i, auto... n) {
        const Floats u = load(first + i, n...), v = load(second + i, n...);
        const Floats c = load(cos + i, n...), s = load(sin + i, n...);
        store(first + i, u * c - v * s, n...);
        store(second + i, v * c + u * s, n...);
    });
}

template <class T>
void rotary(void* heads, int64_t row_stride, int64_t head_stride, const float* cos, int64_t cos_stride,
            const float* sin, int64_t sin_stride, int64_t rows, int64_t num_heads, int64_t half,
            int64_t threads) {
    const int64_t usable = rows * num_heads * half < SERIAL_ELEMENTS ? 1 : threads;
    for_each_task(div_up(rows, TASK_ROWS), usable, [=](int64_t task) {
        const int64_t end = min_of(rows, (task + 1) * TASK_ROWS);
        for (int64_t row = task * TASK_ROWS; row < end; ++row)
            for (int64_t head = 0; head < num_heads; ++head)
                rotate_head(static_cast<T*>(heads) + row * row_stride + head * head_stride,
                            cos + row * cos_stride, sin + row * sin_stride, half);
    });
}

}  // namespace

#define EXPORT(DTYPE, T)                                                                       \
    extern "C" const char* rotary_##DTYPE(                                                     \
        void* heads, int64_t row_stride, int64_t head_stride, const float* cos,                \
        int64_t cos_stride, const float* sin, int64_t sin_stride, int64_t rows,                \
        int64_t num_heads, int64_t half, int64_t threads) {                                    \
        rotary<T>(heads, row_stride, head_stride, cos, cos_stride, sin, sin_stride, rows,      \
                  num_heads, half, threads);                                                   \
        return nullptr;                                                                        \
    }                                                                                          \
    EXPORT_PACKED(rotary_##DTYPE)

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
