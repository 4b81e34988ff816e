// add_circulant on the CPU, as correlations: y_m[p] += w sum_n sum_d K[m, n, d] x_n[(p + d) mod b].
// Each x_n is written twice in a row, so that every shift d of it can be read in whole vectors; a unit
// of work is BLOCKS blocks of y, which share these reads. Each y_m[p] has one accumulator, over n and d.
#include "../cpu/products.h"
#include "../cpu/tables.h"

namespace {

constexpr int BLOCKS = 4;

template <class T, class W>
struct Circulant {
    static constexpr int64_t BLOCK_ROWS = 16;

    int64_t b, in_size, out_size;
    const W* kernel;

    Circulant(Cell<W>& cell, int64_t in_size, int64_t out_size)
        : b(cell[0]), in_size(in_size), out_size(out_size) {
        if (b > 0 && in_size % b == 0 && out_size % b == 0)
            kernel = cell.numbers(1, out_size / b, in_size);
        else cell.error = "a circulant block's size does not divide the target's";
    }

    int64_t columns() const { return out_size; }
    int64_t block_columns() const { return BLOCKS * b; }
    int64_t scratch() const { return BLOCKS * (in_size + padded(b)) + in_size / b * doubled(); }

    const char* compute(const Block<T>& block, float* scratch) const {
        float* taps = scratch;
        float* twice = taps + BLOCKS * in_size;
        const Matrix<float> sums{twice + in_size / b * doubled(), padded(b)};
        const int64_t blocks = block.columns / b;
        const W* rows = kernel + block.column / b * in_size;
        widen(rows, blocks * in_size, taps);
        for (int64_t r = 0; r < block.rows; ++r) {
            write_twice(block.x.row(r), twice);
            if (blocks == BLOCKS) correlate_all<BLOCKS>(taps, twice, sums);
            else
                for (int64_t m = 0; m < blocks; ++m)
                    correlate_all<1>(taps + m * in_size, twice, sums.from(m));
            add_weighted<T>({block.y.row(r) + block.column, b}, sums, blocks, b, block.weight);
        }
        return nullptr;
    }

   private:
    // Room for one x_n twice; what whole vectors read beyond that goes into no sum that is used.
    int64_t doubled() const { return b + padded(b); }

    void write_twice(const T* x, float* out) const {
        for (int64_t k = 0; k < in_size; k += b, out += doubled())
            for_groups(b, LANES, [&](int64_t i, auto... n) {
                const Floats v = load(x + k + i, n...);
                store(out + i, v, n...);
                store(out + b + i, v, n...);
            });
    }

    // sums (M, b) from taps (M, in)
    template <int M>
    void correlate_all(const float* taps, const float* twice, Matrix<float> sums) const {
        int64_t p = 0;
        for (; p + 4 * LANES <= padded(b); p += 4 * LANES)
            correlate<M, 4>(taps, twice + p, sums.from(0, p));
        for (; p < padded(b); p += LANES) correlate<M, 1>(taps, twice + p, sums.from(0, p));
    }

    template <int M, int C>
    void correlate(const float* taps, const float* twice, Matrix<float> sums) const {
        Floats acc[M][C] = {};
        for (int64_t n = 0; n < in_size; n += b, twice += doubled())
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

}  // namespace

EXPORT_LINEAR(add_circulant_float32, Circulant, float, float)
EXPORT_LINEAR(add_circulant_bfloat16, Circulant, bfloat16, bfloat16)
