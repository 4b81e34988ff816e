// y = weight x / sqrt(mean(x^2) + eps) of one row, shared by a base's norms and adapters' in their
// place: an override with the base's own weight gives the base's own bits.
#pragma once

#include "simd.h"

template <class T>
INLINE Floats rounded(Floats v) {
    T narrow[LANES];
    store(narrow, v);
    return load(narrow);
}

template <class T>
INLINE float sum_of_squares(const T* x, int64_t size) {
    Floats acc = {};
    for_groups(size, LANES, [&](int64_t i, auto... n) {
        const Floats v = load(x + i, n...);
        acc += v * v;
    });
    return sum(acc);
}

// Rounded after the division and after the product, as rms_norm/op.py has it. finish(product, i, n...)
// is what is stored of the columns from i.
template <class T, class Finish>
INLINE void rms_row(const T* x, const T* weight, T* y, int64_t size, float eps, Finish finish) {
    const float scale = 1.0f / __builtin_sqrtf(sum_of_squares(x, size) / size + eps);
    for_groups(size, LANES, [&](int64_t i, auto... n) {
        const Floats scaled = rounded<T>(load(x + i, n...) * scale);
        store(y + i, finish(scaled * load(weight + i, n...), i, n...), n...);
    });
}
