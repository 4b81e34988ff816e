// Fourier transforms of up to LANES rows at once, in float32. The rows lie side by side, (size, rows),
// and each of their numbers meets the same operations whatever stands beside it, so that a row's
// result has the same bits in any company. Everything is a sum over e^(+2 pi i k n / size).
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

#include "../cpu/products.h"
#include "../cpu/simd.h"

struct Turn {  // e^(i angle)
    float re, im;
};

struct Complex {
    Floats re, im;
};
INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
INLINE Complex times_i(Complex v) { return {-v.im, v.re}; }
INLINE Complex conjugate(Complex v) { return {v.re, -v.im}; }

// by v. Of two products in a sum the compiler could fuse either; with 0 added, the second is rounded
// in any case.
INLINE Complex turned(Complex v, Turn by) {
    const Floats zero = {};
    return {by.re * v.re - (by.im * v.im + zero), by.re * v.im + (by.im * v.re + zero)};
}

// A buffer of complex numbers.
struct Waves {
    float *re, *im;
    Waves from(int64_t i) const { return {re + i, im + i}; }
    template <class... N>
    INLINE_MEMBER Complex at(int64_t i, N... n) const {
        return {load(re + i, n...), load(im + i, n...)};
    }
    template <class... N>
    INLINE_MEMBER void put(int64_t i, Complex v, N... n) const {
        store(re + i, v.re, n...);
        store(im + i, v.im, n...);
    }
};

// ---- Sums over R numbers: v[k] = sum_j v[j] e^(2 pi i j k / R); roots are those of one, R of them.

template <int R>
INLINE void butterfly(Complex v[R], const Turn* roots) {
    static_assert(R % 2 == 1, "an even radix has a butterfly of its own");
    constexpr int HALF = R / 2;
    const Complex first = v[0];
    Complex sums[HALF], differences[HALF];
    for (int j = 0; j < HALF; ++j) {
        sums[j] = v[j + 1] + v[R - 1 - j];
        differences[j] = v[j + 1] - v[R - 1 - j];
        v[0] = v[0] + sums[j];
    }
    for (int k = 1; k <= HALF; ++k) {
        Complex even = first, odd = {};
        for (int j = 0; j < HALF; ++j) {
            const Turn root = roots[(j + 1) * k % R];
            even = {even.re + root.re * sums[j].re, even.im + root.re * sums[j].im};
            odd = {odd.re + root.im * differences[j].re, odd.im + root.im * differences[j].im};
        }
        v[k] = even + times_i(odd);
        v[R - k] = even - times_i(odd);
    }
}

template <>
INLINE_MEMBER void butterfly<2>(Complex v[2], const Turn*) {
    const Complex sum = v[0] + v[1];
    v[1] = v[0] - v[1];
    v[0] = sum;
}

template <>
INLINE_MEMBER void butterfly<4>(Complex v[4], const Turn*) {
    const Complex even = v[0] + v[2], middle = v[0] - v[2];
    const Complex odd = v[1] + v[3], turned = times_i(v[1] - v[3]);
    v[0] = even + odd;
    v[1] = middle + turned;
    v[2] = even - odd;
    v[3] = middle - turned;
}

// ---- One pass: of radix r over `parts` groups of r numbers each, every `width` of them at once.

struct Pass {
    int64_t radix, parts;
    std::vector<Turn> roots, turns;  // (radix,), (parts, radix - 1)
};

// The pass is the last one, whose numbers need no turn, or not.
template <int R, bool LAST>
static void run_pass(const Pass& pass, Waves from, Waves to, int64_t width) {
    const Turn* roots = pass.roots.data();
    for (int64_t p = 0; p < pass.parts; ++p) {
        const Turn* turns = pass.turns.data() + p * (R - 1);
        const Waves in = from.from(p * width), out = to.from(p * R * width);
        for_groups(width, LANES, [&](int64_t i, auto... n) {
            Complex v[R];
            for (int j = 0; j < R; ++j) v[j] = in.at(j * pass.parts * width + i, n...);
            butterfly<R>(v, roots);
            out.put(i, v[0], n...);
            for (int k = 1; k < R; ++k)
                out.put(k * width + i, LAST ? v[k] : turned(v[k], turns[k - 1]), n...);
        });
    }
}

// The same for any odd radix; what is read is overwritten.
static void run_odd_pass(const Pass& pass, Waves from, Waves to, int64_t width) {
    const int64_t radix = pass.radix, step = pass.parts * width;
    for (int64_t p = 0; p < pass.parts; ++p) {
        const Turn* turns = pass.turns.data() + p * (radix - 1);
        const Waves in = from.from(p * width), out = to.from(p * radix * width);
        for_groups(width, LANES, [&](int64_t i, auto... n) {
            const Complex first = in.at(i, n...);
            Complex total = first;
            for (int64_t j = 1; j <= radix / 2; ++j) {
                const int64_t one = j * step + i, other = (radix - j) * step + i;
                const Complex a = in.at(one, n...), b = in.at(other, n...);
                in.put(one, a + b, n...);
                in.put(other, a - b, n...);
                total = total + (a + b);
            }
            out.put(i, total, n...);
            for (int64_t k = 1; k <= radix / 2; ++k) {
                Complex even = first, odd = {};
                for (int64_t j = 1, angle = k; j <= radix / 2; ++j) {
                    const Turn root = pass.roots[angle];
                    const Complex sum = in.at(j * step + i, n...);
                    const Complex difference = in.at((radix - j) * step + i, n...);
                    even = {even.re + root.re * sum.re, even.im + root.re * sum.im};
                    odd = {odd.re + root.im * difference.re, odd.im + root.im * difference.im};
                    angle += k;
                    if (angle >= radix) angle -= radix;
                }
                out.put(k * width + i, turned(even + times_i(odd), turns[k - 1]), n...);
                out.put((radix - k) * width + i,
                        turned(even - times_i(odd), turns[radix - k - 1]), n...);
            }
        });
    }
}

template <int R>
static void run_pass(const Pass& pass, Waves from, Waves to, int64_t width) {
    if (pass.parts == 1) run_pass<R, true>(pass, from, to, width);
    else run_pass<R, false>(pass, from, to, width);
}

// ---- Whole transforms.

inline Turn turn_of(int64_t numerator, int64_t denominator) {  // that fraction of a whole turn
    const double angle = 2 * M_PI * static_cast<double>(numerator % denominator) / denominator;
    return {static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))};
}

class ComplexTransform {
  public:
    explicit ComplexTransform(int64_t size) {
        for (int64_t rest = size; rest > 1; rest = passes.back().parts) add_pass(rest);
    }

    // Transforms `now`; `other` is room for as much. Which is which may then be the other way round.
    void run(Waves& now, Waves& other, int64_t rows) const {
        int64_t width = rows;
        for (const Pass& pass : passes) {
            switch (pass.radix) {
                case 2: run_pass<2>(pass, now, other, width); break;
                case 3: run_pass<3>(pass, now, other, width); break;
                case 4: run_pass<4>(pass, now, other, width); break;
                case 5: run_pass<5>(pass, now, other, width); break;
                default: run_odd_pass(pass, now, other, width);
            }
            std::swap(now, other);
            width *= pass.radix;
        }
    }

  private:
    // The largest radixes come last, where they need no turns.
    static int64_t radix_of(int64_t rest) {
        if (rest % 4 == 0) return 4;
        int64_t radix = 2;
        while (rest % radix && radix * radix < rest) ++radix;
        return rest % radix ? rest : radix;
    }

    void add_pass(int64_t rest) {
        const int64_t radix = radix_of(rest), parts = rest / radix;
        Pass pass{radix, parts, {}, {}};
        for (int64_t j = 0; j < radix; ++j) pass.roots.push_back(turn_of(j, radix));
        for (int64_t p = 0; p < parts; ++p)
            for (int64_t k = 1; k < radix; ++k) pass.turns.push_back(turn_of(p * k, rest));
        passes.push_back(std::move(pass));
    }

    std::vector<Pass> passes;
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

    // Numbers 0, 1 .. `size` of all rows in a buffer.
    float* column(Waves waves, int64_t n, int64_t rows) const {
        if (!halved) return waves.re + n * rows;
        return (n % 2 ? waves.im : waves.re) + n / 2 * rows;
    }

    // Columns of numbers become `spectrum_scale` times their spectrum.
    void to_spectrum(Waves& now, Waves& other, int64_t rows) const {
        if (!halved) {
            for (int64_t i = 0; i < length * rows; ++i) now.im[i] = 0;
            return transform.run(now, other, rows);
        }
        transform.run(now, other, rows);
        for_groups(rows, LANES, [&](int64_t i, auto... n) {
            now.put(length * rows + i, now.at(i, n...), n...);
            for (int64_t k = 0; k <= length / 2; ++k) {
                const int64_t one = k * rows + i, mirrored = (length - k) * rows + i;
                const Complex a = now.at(one, n...), b = conjugate(now.at(mirrored, n...));
                const Complex odd = times_i(turned(a - b, turns[k]));
                now.put(one, (a + b) - odd, n...);
                now.put(mirrored, conjugate((a + b) + odd), n...);
            }
        });
    }
    float spectrum_scale() const { return halved ? 2.0f : 1.0f; }

    // Columns of x from a spectrum, of which the parts of bins 0 and size / 2 count twice, and the
    // imaginary ones there not at all.
    void to_numbers(Waves& now, Waves& other, int64_t rows) const {
        for_groups(rows, LANES, [&](int64_t i, auto... n) {
            double_real(now, i, n...);
            if (halved) double_real(now, length * rows + i, n...);
            for (int64_t k = 0; halved && k <= length / 2; ++k) {
                const int64_t one = k * rows + i, mirrored = (length - k) * rows + i;
                const Complex a = now.at(one, n...), b = conjugate(now.at(mirrored, n...));
                const Complex odd = times_i(turned(a - b, turns[k]));
                now.put(one, (a + b) + odd, n...);
                now.put(mirrored, conjugate((a + b) - odd), n...);
            }
            for (int64_t k = 1; !halved && k < bins(); ++k)
                now.put((size - k) * rows + i, conjugate(now.at(k * rows + i, n...)), n...);
        });
        transform.run(now, other, rows);
    }

  private:
    template <class... N>
    static void double_real(Waves waves, int64_t i, N... n) {
        const Complex v = waves.at(i, n...);
        waves.put(i, {v.re + v.re, Floats{}}, n...);
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
