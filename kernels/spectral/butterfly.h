// Complex numbers of W rows side by side, and the sums over a few of them that Fourier transforms are
// made of: v[k] = sum_j v[j] e^(2 pi i j k / R), of R numbers.
#pragma once

#include "lanes.h"

struct Turn {  // e^(i angle)
    float re, im;
};

template <int W>
struct Complex {
    Vector<W> re, im;
};
template <int W>
INLINE Complex<W> operator+(Complex<W> a, Complex<W> b) {
    return {a.re + b.re, a.im + b.im};
}
template <int W>
INLINE Complex<W> operator-(Complex<W> a, Complex<W> b) {
    return {a.re - b.re, a.im - b.im};
}
template <int W>
INLINE Complex<W> times_i(Complex<W> v) {
    return {-v.im, v.re};
}
template <int W>
INLINE Complex<W> conjugate(Complex<W> v) {
    return {v.re, -v.im};
}

// by v. Of two products in a sum the compiler could fuse either; with 0 added, the second is rounded
// in any case.
template <int W, class By>
INLINE Complex<W> turned(Complex<W> v, By by) {
    const Vector<W> zero = {};
    return {by.re * v.re - (by.im * v.im + zero), by.re * v.im + (by.im * v.re + zero)};
}

// Of N numbers, each of W rows.
template <int W, int N>
INLINE auto turns_of(const Turn* turns, int64_t step) {
    if constexpr (N == 1) return *turns;
    else return Complex<N * W>{spread<W>(&turns->re, 2 * step), spread<W>(&turns->im, 2 * step)};
}

// Roots are those of one, e^(2 pi i j / R) at j * STEP.
template <int R, int STEP, int W>
INLINE void odd_butterfly(Complex<W> (&v)[R], const Turn* roots) {
    constexpr int HALF = R / 2;
    const Complex<W> first = v[0];
    Complex<W> sums[HALF], differences[HALF];
#pragma GCC unroll 8
    for (int j = 0; j < HALF; ++j) {
        sums[j] = v[j + 1] + v[R - 1 - j];
        differences[j] = v[j + 1] - v[R - 1 - j];
        v[0] = v[0] + sums[j];
    }
#pragma GCC unroll 8
    for (int k = 1; k <= HALF; ++k) {
        Complex<W> even = first, odd = {};
#pragma GCC unroll 8
        for (int j = 0; j < HALF; ++j) {
            const Turn root = roots[(j + 1) * k % R * STEP];
            even = {even.re + root.re * sums[j].re, even.im + root.re * sums[j].im};
            odd = {odd.re + root.im * differences[j].re, odd.im + root.im * differences[j].im};
        }
        v[k] = even + times_i(odd);
        v[R - k] = even - times_i(odd);
    }
}

template <int R>
constexpr int FACTOR = R % 4 == 0 && R > 4 ? 4 : R % 3 == 0 && R > 3 ? 3 : 1;

template <int R, int STEP = 1, int W>
INLINE void butterfly(Complex<W> (&v)[R], const Turn* roots) {
    if constexpr (R == 2) {
        const Complex<W> sum = v[0] + v[1];
        v[1] = v[0] - v[1];
        v[0] = sum;
    } else if constexpr (R == 4) {
        const Complex<W> even = v[0] + v[2], middle = v[0] - v[2];
        const Complex<W> odd = v[1] + v[3], turned = times_i(v[1] - v[3]);
        v[0] = even + odd;
        v[1] = middle + turned;
        v[2] = even - odd;
        v[3] = middle - turned;
    } else if constexpr (FACTOR<R> > 1) {
        // numbers j = B m + n, sums k = l + A h: over the A at m, turned by n l / R, and over the B at n
        constexpr int A = FACTOR<R>, B = R / A;
        Complex<W> outer[A][B];
#pragma GCC unroll 8
        for (int n = 0; n < B; ++n) {
            Complex<W> inner[A];
#pragma GCC unroll 8
            for (int m = 0; m < A; ++m) inner[m] = v[B * m + n];
            butterfly<A, STEP * B>(inner, roots);
#pragma GCC unroll 8
            for (int l = 0; l < A; ++l)
                outer[l][n] = n * l == 0           ? inner[l]
                              : 4 * n * l == R     ? times_i(inner[l])
                                                   : turned(inner[l], roots[n * l * STEP]);
        }
#pragma GCC unroll 8
        for (int l = 0; l < A; ++l) {
            butterfly<B, STEP * A>(outer[l], roots);
#pragma GCC unroll 8
            for (int h = 0; h < B; ++h) v[l + A * h] = outer[l][h];
        }
    } else {
        odd_butterfly<R, STEP>(v, roots);
    }
}
