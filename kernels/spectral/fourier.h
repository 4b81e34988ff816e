// Fourier transforms of W rows at once, in float32. The rows lie side by side, (size, W), and each of
// their numbers meets the same operations whatever W is and stands beside it, so that a row's result
// has the same bits in any company. Everything is a sum over e^(+2 pi i k n / size).
//
// Complex numbers are transformed by Stockham's algorithm: a pass for each factor of the size, which
// reads one buffer, writes another and leaves everything in order. Its inner loop runs over numbers
// that lie side by side: the rows, and from the second pass on ever more of each row.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "passes.h"

// A spectrum: of each bin the real parts of W rows, then the imaginary ones, so that a vector may
// hold both.
template <int W>
struct Bins {
    float* data;
    template <int N>
    INLINE_MEMBER Complex<N * W> at(int64_t k, int64_t step = 1) const {
        return waves().template parts_at<W, N>(2 * W * k, 2 * W * step);
    }
    template <int N>
    INLINE_MEMBER void put(int64_t k, Complex<N * W> v, int64_t step = 1) const {
        waves().template put_parts<W, N>(2 * W * k, 2 * W * step, v);
    }
    INLINE_MEMBER Waves waves() const { return {data, data + W}; }
};

// The same of numbers in the order of a transform.
template <int W>
struct Planes {
    Waves waves;
    template <int N>
    INLINE_MEMBER Complex<N * W> at(int64_t k, int64_t step = 1) const {
        return step == 1 ? waves.at<N * W>(W * k) : waves.parts_at<W, N>(W * k, W * step);
    }
    template <int N>
    INLINE_MEMBER void put(int64_t k, Complex<N * W> v, int64_t step = 1) const {
        if (step == 1) waves.put(W * k, v);
        else waves.put_parts<W, N>(W * k, W * step, v);
    }
};

// ---- Whole transforms.

inline Turn turn_of(int64_t numerator, int64_t denominator) {  // that fraction of a whole turn
    const double angle = 2 * M_PI * static_cast<double>(numerator % denominator) / denominator;
    return {static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))};
}

class ComplexTransform {
  public:
    explicit ComplexTransform(int64_t size) {
        for (const int64_t radix : radixes(size)) {
            add_pass(size, radix);
            size /= radix;
        }
    }

    // Transforms `now` of W rows; `other` is room for as much. Which is which may then be the other
    // way round.
    template <int W>
    void run(Waves& now, Waves& other) const {
        int64_t width = W;
        for (const Pass& pass : passes) {
            if (width % 16 == 0) run_any_pass<16>(pass, now, other, width);
            else if (width % 8 == 0) run_any_pass<8>(pass, now, other, width);
            else run_any_pass<4>(pass, now, other, width);
            std::swap(now, other);
            width *= pass.radix;
        }
    }

  private:
    // A prime that has no butterfly is a radix of its own. The largest with one come last, where they
    // need no turns.
    static std::vector<int64_t> radixes(int64_t size) {
        int64_t smooth = 1, rest = max_of(size, 1);
        for (const int64_t prime : {2, 3, 5})
            for (; rest % prime == 0; rest /= prime) smooth *= prime;
        std::vector<int64_t> found;
        for (int64_t prime = 7; rest > 1; prime += 2) {
            if (prime * prime > rest) prime = rest;
            for (; rest % prime == 0; rest /= prime) found.push_back(prime);
        }
        const std::vector<int64_t> others = fewest(smooth, 12);
        found.insert(found.end(), others.begin(), others.end());
        return found;
    }

    // Every pass goes through the cache once more: there are as few as can be, of ascending radixes up
    // to `most`, and among those the most even ones. None, if there are none of that product.
    static std::vector<int64_t> fewest(int64_t product, int64_t most) {
        std::vector<int64_t> best;
        for (const int64_t last : {12, 9, 8, 6, 5, 4, 3, 2}) {
            if (last > most || product % last) continue;
            std::vector<int64_t> found = fewest(product / last, last);
            if (found.empty() && product > last) continue;
            found.push_back(last);
            if (best.empty() || found.size() <= best.size()) best = found;
        }
        return best;
    }

    void add_pass(int64_t rest, int64_t radix) {
        const int64_t parts = rest / radix;
        Pass pass{radix, parts, {}, {}};
        for (int64_t j = 0; j < radix; ++j) pass.roots.push_back(turn_of(j, radix));
        for (int64_t p = 0; p < parts; ++p)
            for (int64_t k = 1; k < radix; ++k) pass.turns.push_back(turn_of(p * k, rest));
        passes.push_back(std::move(pass));
    }

    std::vector<Pass> passes;
};

// Numbers of W rows one after the other.
template <int W>
struct Columns {
    float *even, *odd;
    int64_t stride;
    INLINE_MEMBER float* at(int64_t i) const { return (i % 2 ? odd : even) + i / 2 * stride; }
};

// Of real numbers x (size,), and back. They have the spectrum X[k] = sum_n x[n] e^(2 pi i k n / size),
// of which bins k = 0 .. size / 2 say all: X[size - k] is the conjugate. An even size takes half as
// long: x[2 m] + i x[2 m + 1] are transformed as one complex number.
class RealTransform {
  public:
    const int64_t size;
    const bool halved;

    explicit RealTransform(int64_t size)
        : size(size), halved(size % 2 == 0), length(halved ? size / 2 : size), transform(length) {
        if (halved)
            for (int64_t k = 0; k <= length / 2; ++k) turns.push_back(turn_of(k, size));
    }

    int64_t bins() const { return size / 2 + 1; }
    int64_t room() const { return length + 1; }  // complex numbers of a row in a buffer

    // Where numbers `n`, n + 1 .. of W rows stand in a buffer, for an even n.
    template <int W>
    Columns<W> columns(Waves waves, int64_t n) const {
        if (halved) return {waves.re + n / 2 * W, waves.im + n / 2 * W, W};
        return {waves.re + n * W, waves.re + (n + 1) * W, 2 * W};
    }

    // Columns of numbers in `now` become `spectrum_scale` times their spectrum.
    template <int W>
    Bins<W> to_spectrum(Waves& now, Waves& other) const {
        if (!halved) std::fill(now.im, now.im + length * W, 0.0f);
        transform.run<W>(now, other);
        std::swap(now, other);
        const Planes<W> from{other};
        const Bins<W> to{now.re};
        if (halved) {
            from.template put<1>(length, from.template at<1>(0));
            split<W, false>(from, to);
        } else {
            for (int64_t k = 0; k < bins(); ++k) to.template put<1>(k, from.template at<1>(k));
        }
        return to;
    }
    float spectrum_scale() const { return halved ? 2.0f : 1.0f; }

    // Columns of x in `now` from a spectrum there, of which the parts of bins 0 and size / 2 count
    // twice, and the imaginary ones there not at all.
    template <int W>
    void to_numbers(Waves& now, Waves& other) const {
        std::swap(now, other);
        const Bins<W> from{other.re};
        const Planes<W> to{now};
        double_real(from, 0);
        if (halved) {
            double_real(from, length);
            split<W, true>(from, to);
        } else {
            to.template put<1>(0, from.template at<1>(0));
            for (int64_t k = 1; k < bins(); ++k) {
                const Complex<W> v = from.template at<1>(k);
                to.template put<1>(k, v);
                to.template put<1>(size - k, conjugate(v));
            }
        }
        transform.run<W>(now, other);
    }

  private:
    template <int W>
    static void double_real(Bins<W> bins, int64_t k) {
        const Complex<W> v = bins.template at<1>(k);
        bins.template put<1>(k, Complex<W>{v.re + v.re, Vector<W>{}});
    }

    // Between bins of the spectrum and those of the complex numbers of half as many.
    template <int W, bool BACK, class From, class To>
    void split(From from, To to) const {
        int64_t k = 0;
        for (; k + TOGETHER<W> <= length / 2 + 1; k += TOGETHER<W>)
            split_some<W, TOGETHER<W>, BACK>(from, to, k);
        for (; k <= length / 2; ++k) split_some<W, 1, BACK>(from, to, k);
    }

    template <int W, int N, bool BACK, class From, class To>
    INLINE_MEMBER void split_some(From from, To to, int64_t k) const {
        const Complex<N * W> a = from.template at<N>(k);
        const Complex<N * W> b = conjugate(from.template at<N>(length - k, -1));
        const Complex<N * W> odd = times_i(turned(a - b, turns_of<W, N>(&turns[k], 1)));
        to.template put<N>(k, BACK ? (a + b) + odd : (a + b) - odd);
        to.template put<N>(length - k, conjugate(BACK ? (a + b) - odd : (a + b) + odd), -1);
    }

    const int64_t length;
    const ComplexTransform transform;
    std::vector<Turn> turns;
};

// Its tables take longer to make than a transform; a model has few sizes. In use, one outlives its
// being forgotten.
inline std::shared_ptr<const RealTransform> real_transform(int64_t size) {
    constexpr size_t MAX_KEPT = 64;
    static std::mutex in_use;
    static std::map<int64_t, std::shared_ptr<const RealTransform>> kept;
    const std::lock_guard<std::mutex> lock(in_use);
    const auto found = kept.find(size);
    if (found != kept.end()) return found->second;
    if (kept.size() == MAX_KEPT) kept.clear();
    return kept[size] = std::make_shared<const RealTransform>(size);
}
