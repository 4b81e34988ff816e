// Fourier transforms of W rows at once, in float32. The rows lie side by side, (size, W), and each of
// their numbers meets the same operations whatever W is and stands beside it, so that a row's result
// has the same bits in any company. Everything is a sum over e^(+2 pi i k n / size).
//
// Complex numbers are transformed by Stockham's algorithm: a pass for each factor of the size, which
// reads one buffer, writes another and leaves everything in order. Its inner loop runs over numbers
// that lie side by side: the rows, and from the second pass on ever more of each row.
#pragma once

#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "butterfly.h"

// A buffer of complex numbers.
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
};

// ---- One pass: of radix r over `parts` groups of r numbers each, every `width` of them at once.

struct Pass {
    int64_t radix, parts;
    std::vector<Turn> roots, turns;  // (radix,), (parts, radix - 1)
};

// The pass is the last one, whose numbers need no turn, or not.
template <int R, bool LAST, int W>
static void run_pass(const Pass& pass, Waves from, Waves to, int64_t width) {
    const Turn* roots = pass.roots.data();
    for (int64_t p = 0; p < pass.parts; ++p) {
        const Turn* turns = pass.turns.data() + p * (R - 1);
        const Waves in = from.from(p * width), out = to.from(p * R * width);
        for (int64_t i = 0; i < width; i += W) {
            Complex<W> v[R];
#pragma GCC unroll 16
            for (int j = 0; j < R; ++j) v[j] = in.at<W>(j * pass.parts * width + i);
            butterfly<R>(v, roots);
            out.put(i, v[0]);
#pragma GCC unroll 16
            for (int k = 1; k < R; ++k)
                out.put(k * width + i, LAST ? v[k] : turned(v[k], turns[k - 1]));
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
    if (pass.parts == 1) run_pass<R, true, W>(pass, from, to, width);
    else run_pass<R, false, W>(pass, from, to, width);
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

    // Columns of numbers become `spectrum_scale` times their spectrum.
    template <int W>
    void to_spectrum(Waves& now, Waves& other) const {
        if (!halved) {
            for (int64_t i = 0; i < length * W; ++i) now.im[i] = 0;
            return transform.run<W>(now, other);
        }
        transform.run<W>(now, other);
        now.put(length * W, now.at<W>(0));
        for (int64_t k = 0; k <= length / 2; ++k) {
            const int64_t one = k * W, mirrored = (length - k) * W;
            const Complex<W> a = now.at<W>(one), b = conjugate(now.at<W>(mirrored));
            const Complex<W> odd = times_i(turned(a - b, turns[k]));
            now.put(one, (a + b) - odd);
            now.put(mirrored, conjugate((a + b) + odd));
        }
    }
    float spectrum_scale() const { return halved ? 2.0f : 1.0f; }

    // Columns of x from a spectrum, of which the parts of bins 0 and size / 2 count twice, and the
    // imaginary ones there not at all.
    template <int W>
    void to_numbers(Waves& now, Waves& other) const {
        double_real<W>(now, 0);
        if (halved) double_real<W>(now, length * W);
        for (int64_t k = 0; halved && k <= length / 2; ++k) {
            const int64_t one = k * W, mirrored = (length - k) * W;
            const Complex<W> a = now.at<W>(one), b = conjugate(now.at<W>(mirrored));
            const Complex<W> odd = times_i(turned(a - b, turns[k]));
            now.put(one, (a + b) + odd);
            now.put(mirrored, conjugate((a + b) - odd));
        }
        for (int64_t k = 1; !halved && k < bins(); ++k)
            now.put((size - k) * W, conjugate(now.at<W>(k * W)));
        transform.run<W>(now, other);
    }

  private:
    template <int W>
    static void double_real(Waves waves, int64_t i) {
        const Complex<W> v = waves.at<W>(i);
        waves.put(i, Complex<W>{v.re + v.re, Vector<W>{}});
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
