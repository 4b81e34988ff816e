// silu_mul on the CPU.
#include "../cpu/parallel.h"
#include "../cpu/program.h"
#include "../cpu/simd.h"

namespace {

constexpr int64_t SERIAL_ELEMENTS = 1 << 14;  // below this, waking threads costs more than it saves
constexpr int64_t TASK_ELEMENTS = 1 << 12;

// a / b for what is rounded to T: an exact division is slow, and bfloat16 keeps 8 of its 24 bits.
template <class T>
INLINE Floats quotient(Floats a, Floats b) {
#ifdef __AVX512F__
    if (sizeof(T) < sizeof(float)) {
        const Floats near = (Floats)_mm512_rcp14_ps((__m512)b);  // within 2^-14
        return a * (near * (2.0f - b * near));
    }
#endif
    return a / b;
}

// z / (1 + exp(-z)), by exp(-|z|) so that nothing overflows
template <class T>
INLINE Floats silu(Floats z) {
    const Ints negative = z < 0.0f;
    const Floats e = exp_nonpositive((Floats)((Ints)z | INT32_MIN));
    const Floats numerator = (Floats)(((Ints)e & negative) | ((Ints)splat(1.0f) & ~negative));
    return z * quotient<T>(numerator, 1.0f + e);
}

template <class T>
void silu_mul(const void* gate_up, int64_t row_stride, void* y, int64_t rows, int64_t size,
              int64_t threads) {
    const int64_t usable = rows * size < SERIAL_ELEMENTS ? 1 : threads;
    const int64_t parts = div_up(size, TASK_ELEMENTS);
    for_each_task(rows * parts, usable, [=](int64_t task) {
        const int64_t row = task / parts, from = task % parts * TASK_ELEMENTS;
        const T* gate = static_cast<const T*>(gate_up) + row * row_stride + from;
        T* out = static_cast<T*>(y) + row * size + from;
        for_groups(min_of(TASK_ELEMENTS, size - from), LANES, [&](int64_t i, auto... n) {
            store(out + i, silu<T>(load(gate + i, n...)) * load(gate + size + i, n...), n...);
        });
    });
}

}  // namespace

#define EXPORT(DTYPE, T)                                                                       \
    extern "C" const char* silu_mul_##DTYPE(const void* gate_up, int64_t row_stride, void* y,  \
                                            int64_t rows, int64_t size, int64_t threads) {     \
        silu_mul<T>(gate_up, row_stride, y, rows, size, threads);                              \
        return nullptr;                                                                        \
    }                                                                                          \
    EXPORT_PACKED(silu_mul_##DTYPE)

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
