// largest on the CPU: rows of a whole vocabulary, in parts that threads share.
#include <cmath>
#include <memory>

#include "../cpu/parallel.h"
#include "../cpu/program.h"
#include "../cpu/simd.h"

namespace {

constexpr int64_t SERIAL_NUMBERS = 1 << 14;  // below this, waking threads costs more than it saves
constexpr int64_t PART = 1 << 14;
constexpr int64_t VECTORS = 8;
constexpr int64_t BLOCK = VECTORS * LANES;

// What was the largest so far, and where it stood first. NaN is larger than every number and is
// never replaced.
struct Best {
    float value;
    int64_t index;

    bool is_final() const { return value != value; }

    void meet(float x, int64_t at) {
        if (!(x <= value) && !is_final()) *this = {x, at};
    }
};

// Whether any of so many vectors is larger than `most` or NaN.
template <int64_t COUNT>
INLINE bool any_above(const float* x, float most) {
    const Floats bound = splat(most);
#ifdef __AVX512F__
    __mmask16 within = 0xffff;
#pragma GCC unroll 8
    for (int64_t v = 0; v < COUNT; ++v)
        within = _mm512_mask_cmp_ps_mask(within, (__m512)load(x + v * LANES), (__m512)bound,
                                         _CMP_LE_OQ);
    return within != 0xffff;
#else
    Ints within = load(x) <= bound;
    for (int64_t v = 1; v < COUNT; ++v) within &= load(x + v * LANES) <= bound;
    int32_t all = -1;
    for (int64_t i = 0; i < LANES; ++i) all &= within[i];
    return all != -1;
#endif
}

// Few blocks have a new largest, and few vectors of these: the others are compared as a whole.
Best largest_of(const float* x, int64_t first, int64_t end) {
    Best best{x[first], first};
    const auto meet_all = [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) best.meet(x[i], i);
    };
    int64_t i = first;
    for (; i + BLOCK <= end && !best.is_final(); i += BLOCK) {
        if (!any_above<VECTORS>(x + i, best.value)) continue;
        for (int64_t v = i; v < i + BLOCK; v += LANES)
            if (any_above<1>(x + v, best.value)) meet_all(v, v + LANES);
    }
    meet_all(i, end);
    return best;
}

}  // namespace

extern "C" const char* largest(int32_t* indices, const float* x, int64_t row_stride, int64_t rows,
                               int64_t size, int64_t threads) {
    if (size < 1 || size > INT32_MAX) return "rows of no numbers, or of too many to count";
    const int64_t parts = div_up(size, PART);
    const std::unique_ptr<Best[]> found(new Best[rows * parts]);
    for_each_task(rows * parts, rows * size < SERIAL_NUMBERS ? 1 : threads, [&](int64_t task) {
        const int64_t row = task / parts, first = task % parts * PART;
        found[task] = largest_of(x + row * row_stride, first, min_of(first + PART, size));
    });
    for (int64_t row = 0; row < rows; ++row) {
        Best best = found[row * parts];
        for (int64_t part = 1; part < parts; ++part)
            best.meet(found[row * parts + part].value, found[row * parts + part].index);
        indices[row] = std::isfinite(best.value) ? static_cast<int32_t>(best.index) : -1;
    }
    return nullptr;
}
EXPORT_PACKED(largest)
