// A pass of a Fourier transform of W rows at once, from one buffer to another.
#pragma once

#include <vector>

#include "butterfly.h"

// A buffer of complex numbers of rows side by side, real and imaginary parts apart.
struct Waves {
    float *re, *im;
    INLINE_MEMBER Waves from(int64_t i) const { return {re + i, im + i}; }
    template <int W>
    INLINE_MEMBER Complex<W> at(int64_t i) const {
        return {load_lanes<W>(re + i), load_lanes<W>(im + i)};
    }
    template <int W>
    INLINE_MEMBER void put(int64_t i, Complex<W> v) const {
        store_lanes(re + i, v.re);
        store_lanes(im + i, v.im);
    }
    // N times W lanes, each `step` behind those before
    template <int W, int N>
    INLINE_MEMBER Complex<N * W> parts_at(int64_t i, int64_t step) const {
        return {load_parts<W, N>(re + i, step), load_parts<W, N>(im + i, step)};
    }
    template <int W, int N>
    INLINE_MEMBER void put_parts(int64_t i, int64_t step, Complex<N * W> v) const {
        store_parts<W, N>(re + i, step, v.re);
        store_parts<W, N>(im + i, step, v.im);
    }
};

// ---- One pass: of radix r over `parts` groups of r numbers each, every `width` of them at once.

struct Pass {
    int64_t radix, parts;
    std::vector<Turn> roots, turns;  // (radix,), (parts, radix - 1)
};

// The pass is the last one, whose numbers need no turn, or not; N groups of a `width` of W are
// computed together.
template <int R, bool LAST, int W, int N>
static void run_pass(const Pass& pass, Waves from, Waves to, int64_t width) {
    const Turn* roots = pass.roots.data();
    for (int64_t p = 0; p < pass.parts; p += N) {
        const Turn* turns = pass.turns.data() + p * (R - 1);
        const Waves in = from.from(p * width), out = to.from(p * R * width);
        for (int64_t i = 0; i < width; i += W) {
            Complex<N * W> v[R];
#pragma GCC unroll 16
            for (int j = 0; j < R; ++j) v[j] = in.at<N * W>(j * pass.parts * width + i);
            butterfly<R>(v, roots);
            out.put_parts<W, N>(i, R * width, v[0]);
#pragma GCC unroll 16
            for (int k = 1; k < R; ++k) {
                if (!LAST) v[k] = turned(v[k], turns_of<W, N>(turns + k - 1, R - 1));
                out.put_parts<W, N>(k * width + i, R * width, v[k]);
            }
        }
    }
}

// The same for any odd radix; what is read is overwritten.
template <int W>
static void run_odd_pass(const Pass& pass, Waves from, Waves to, int64_t width) {
    const int64_t radix = pass.radix, step = pass.parts * width;
    for (int64_t p = 0; p < pass.parts; ++p) {
        const Turn* turns = pass.turns.data() + p * (radix - 1);
        const Waves in = from.from(p * width), out = to.from(p * radix * width);
        for (int64_t i = 0; i < width; i += W) {
            const Complex<W> first = in.at<W>(i);
            Complex<W> total = first;
            for (int64_t j = 1; j <= radix / 2; ++j) {
                const int64_t one = j * step + i, other = (radix - j) * step + i;
                const Complex<W> a = in.at<W>(one), b = in.at<W>(other);
                in.put(one, a + b);
                in.put(other, a - b);
                total = total + (a + b);
            }
            out.put(i, total);
            for (int64_t k = 1; k <= radix / 2; ++k) {
                Complex<W> even = first, odd = {};
                for (int64_t j = 1, angle = k; j <= radix / 2; ++j) {
                    const Turn root = pass.roots[angle];
                    const Complex<W> sum = in.at<W>(j * step + i);
                    const Complex<W> difference = in.at<W>((radix - j) * step + i);
                    even = {even.re + root.re * sum.re, even.im + root.re * sum.im};
                    odd = {odd.re + root.im * difference.re, odd.im + root.im * difference.im};
                    angle += k;
                    if (angle >= radix) angle -= radix;
                }
                out.put(k * width + i, turned(even + times_i(odd), turns[k - 1]));
                out.put((radix - k) * width + i,
                        turned(even - times_i(odd), turns[radix - k - 1]));
            }
        }
    }
}

template <int R, int W>
static void run_pass(const Pass& pass, Waves from, Waves to, int64_t width) {
    constexpr int N = TOGETHER<W>;
    if (pass.parts == 1) run_pass<R, true, W, 1>(pass, from, to, width);
    else if (width == W && pass.parts % N == 0) run_pass<R, false, W, N>(pass, from, to, width);
    else run_pass<R, false, W, 1>(pass, from, to, width);
}

template <int W>
static void run_any_pass(const Pass& pass, Waves from, Waves to, int64_t width) {
    switch (pass.radix) {
        case 2: return run_pass<2, W>(pass, from, to, width);
        case 3: return run_pass<3, W>(pass, from, to, width);
        case 4: return run_pass<4, W>(pass, from, to, width);
        case 5: return run_pass<5, W>(pass, from, to, width);
        case 6: return run_pass<6, W>(pass, from, to, width);
        case 8: return run_pass<8, W>(pass, from, to, width);
        case 9: return run_pass<9, W>(pass, from, to, width);
        case 12: return run_pass<12, W>(pass, from, to, width);
        default: return run_odd_pass<W>(pass, from, to, width);
    }
}
