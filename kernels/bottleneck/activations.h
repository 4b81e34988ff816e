// The activations of op.py on LANES floats. NaN comes out as NaN.
#pragma once

#include "../cpu/simd.h"

INLINE Floats absolute(Floats x) { return (Floats)((Ints)x & INT32_MAX); }

INLINE Floats select(Ints condition, Floats yes, Floats no) {
    return (Floats)(((Ints)yes & condition) | ((Ints)no & ~condition));
}

INLINE Floats relu(Floats x) { return select(x < 0.0f, Floats{}, x); }

INLINE Floats relu_squared(Floats x) { return relu(x) * relu(x); }

INLINE Floats relu6(Floats x) { return relu(select(x > 6.0f, splat(6.0f), x)); }

INLINE Floats leaky_relu(Floats x) { return select(x < 0.0f, x * 0.01f, x); }

// 1 / (1 + exp(-x)), by exp(-|x|) so that nothing overflows
INLINE Floats sigmoid(Floats x) {
    const Floats e = exp_nonpositive(-absolute(x));
    return select(x < 0.0f, e, splat(1.0f)) / (1.0f + e);
}

INLINE Floats silu(Floats x) { return x * sigmoid(x); }

INLINE Floats gelu_quick(Floats x) { return x * sigmoid(1.702f * x); }

// x (1 + tanh(k)) / 2 = x sigmoid(2 k),  k = sqrt(2 / pi) (x + 0.044715 x^3)
INLINE Floats gelu_tanh(Floats x) {
    return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
}

// Below 0.625, where 1 - exp(-2 |x|) would lose digits, the odd polynomial of Cephes' tanhf.
INLINE Floats tanh(Floats x) {
    const Floats square = x * x;
    Floats p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const Floats small = p * square * x + x;
    const Floats e = exp_nonpositive(-2.0f * absolute(x));
    const Floats size = (1.0f - e) / (1.0f + e);
    return select(absolute(x) < 0.625f, small, select(x < 0.0f, -size, size));
}

// x Phi(x),  Phi(-|x|) = erfc(u) / 2,  u = |x| / sqrt(2),  erfc(u) = t P(t) exp(-u^2),
// t = 1 / (1 + 0.37 u): P is a polynomial of degree 8 fitted to a relative error of 2e-8.
INLINE Floats gelu(Floats x) {
    const Floats u = absolute(x) * 0.707106781f;
    const Floats t = 1.0f / (1.0f + 0.37f * u);
    Floats p = splat(0.0620600693f);
    p = p * t + -0.303940648f;
    p = p * t + 0.488227216f;
    p = p * t + -0.286907111f;
    p = p * t + 0.311914563f;
    p = p * t + 0.10604004f;
    p = p * t + 0.206379142f;
    p = p * t + 0.207411884f;
    p = p * t + 0.20881483f;
    const Floats tail = 0.5f * t * p * exp_nonpositive(-u * u);
    return x * select(x < 0.0f, tail, 1.0f - tail);
}
