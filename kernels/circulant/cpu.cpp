// add_circulant on the CPU, as correlations: y_m[p] += w sum_n sum_d K[m, n, d] x_n[(p + d) mod b].
// In bfloat16 the matrix unit computes them, where there is one and its tiles fit the blocks, and else
// vectors: there a unit of work is up to sixteen rows of one segment and a few blocks of y.
#include "tile_units.h"

namespace {

// With vectors: each x_n is written twice in a row, so that every shift d of it can be read in whole
// vectors, and the blocks of y share these reads. Each y_m[p] has one accumulator, over n and d.
template <class W>
class VectorCirculant {
    const CirculantKernel<W>& kernel;
    const int64_t b, in_size;
    float *taps, *twice;  // K (BLOCKS, in) and x, widened
    const Matrix<float> sums;

  public:
    static constexpr int64_t BLOCKS = 4;

    static int64_t scratch(const CirculantKernel<W>& kernel) {
        const int64_t b = kernel.b, in_size = kernel.in_size;
        return BLOCKS * (in_size + padded(b)) + in_size / b * doubled(b);
    }

    VectorCirculant(const CirculantKernel<W>& kernel, float* scratch)
        : kernel(kernel), b(kernel.b), in_size(kernel.in_size), taps(scratch),
          twice(taps + BLOCKS * in_size), sums{twice + in_size / b * doubled(b), padded(b)} {}

    template <class T>
    void correct(const Block<T>& block) const {
        const int64_t blocks = block.columns / b;
        widen(kernel.rows(block.column), blocks * in_size, taps);
        for (int64_t r = 0; r < block.rows; ++r) {
            write_twice(block.x.row(r));
            if (blocks == BLOCKS) correlate_all<BLOCKS>(taps, sums);
            else
                for (int64_t m = 0; m < blocks; ++m)
                    correlate_all<1>(taps + m * in_size, sums.from(m));
            add_weighted<T>({block.y.row(r) + block.column, b}, sums, blocks, b, block.weight);
        }
    }

  private:
    // Room for one x_n twice; what whole vectors read beyond that goes into no sum that is used.
    static int64_t doubled(int64_t b) { return b + padded(b); }

    template <class T>
    void write_twice(const T* x) const {
        float* out = twice;
        for (int64_t k = 0; k < in_size; k += b, out += doubled(b))
            for_groups(b, LANES, [&](int64_t i, auto... n) {
                const Floats v = load(x + k + i, n...);
                store(out + i, v, n...);
                store(out + b + i, v, n...);
            });
    }

    // sums (M, b) from taps (M, in)
    template <int M>
    void correlate_all(const float* taps, Matrix<float> sums) const {
        int64_t p = 0;
        for (; p + 4 * LANES <= padded(b); p += 4 * LANES)
            correlate<M, 4>(taps, twice + p, sums.from(0, p));
        for (; p < padded(b); p += LANES) correlate<M, 1>(taps, twice + p, sums.from(0, p));
    }

    template <int M, int C>
    void correlate(const float* taps, const float* twice, Matrix<float> sums) const {
        Floats acc[M][C] = {};
        for (int64_t n = 0; n < in_size; n += b, twice += doubled(b))
            for (int64_t d = 0; d < b; ++d) {
                Floats tap[M];
                for (int m = 0; m < M; ++m) tap[m] = splat(taps[m * in_size + n + d]);
                for (int c = 0; c < C; ++c) {
                    const Floats x = held(load(twice + d + c * LANES));
                    for (int m = 0; m < M; ++m) acc[m][c] += tap[m] * x;
                }
            }
        for (int m = 0; m < M; ++m)
            for (int c = 0; c < C; ++c) store(sums.row(m) + c * LANES, acc[m][c]);
    }
};

template <class T, class W>
struct Circulant {
    static constexpr int64_t BLOCK_ROWS = 16;

    int64_t out_size;
    CirculantKernel<W> kernel;

    Circulant(Cell<W>& cell, int64_t in_size, int64_t out_size)
        : out_size(out_size), kernel(kernel_of(cell, in_size, out_size)) {}

    int64_t columns() const { return on_tiles(kernel) ? 0 : out_size; }
    int64_t block_columns() const { return VectorCirculant<W>::BLOCKS * kernel.b; }
    int64_t scratch() const { return VectorCirculant<W>::scratch(kernel); }

    const char* compute(const Block<T>& block, float* scratch) const {
        VectorCirculant<W>(kernel, scratch).correct(block);
        return nullptr;
    }
};

template <class T>
const char* add_circulant(const LinearCall<T>& call) {
#ifdef HAS_AMX
    if constexpr (std::is_same_v<T, bfloat16>)
        if (matrix_unit()) return add_on_tiles(call, correct_linear<Circulant<T, T>, T, T>);
#endif
    return correct_linear<Circulant<T, T>, T>(call);
}

}  // namespace

EXPORT_CORRECTION(add_circulant_float32, float, add_circulant)
EXPORT_CORRECTION(add_circulant_bfloat16, bfloat16, add_circulant)
