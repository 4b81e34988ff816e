// add_bottleneck on the CPU. A unit of work is up to BLOCK_ROWS rows of one segment:
//   inner  = w f(z D^T + d)         (rows, width) float32, stays near,
//   out   += inner U + w u.
// A unit reads all of its z before it writes, so that `out` may be what z is made of.
#include "../cpu/expand.h"
#include "../cpu/products.h"
#include "../cpu/program.h"
#include "../cpu/tables.h"
#include "activations.h"

namespace {

constexpr int64_t BLOCK_ROWS = 32;

// By the numbers of op.py.
enum Source { OUTPUT, RESIDUAL, SUM, SOURCES };
enum Activation {
    LINEAR, RELU, SILU, GELU, GELU_TANH, TANH, SIGMOID, LEAKY_RELU, GELU_QUICK, RELU6, RELU_SQUARED,
    ACTIVATIONS
};
enum Field { WIDTH, ACTIVATION, SOURCE, DOWN, UP, DOWN_BIAS, UP_BIAS };

template <class T>
struct Adapter {
    int64_t hidden, width, activation, source;
    const T *down, *down_bias;
    Expansion<T> up;

    Adapter(Cell<T>& cell, int64_t hidden)
        : hidden(hidden), width(cell[WIDTH]), activation(cell[ACTIVATION]), source(cell[SOURCE]),
          down(cell.numbers(DOWN, width, hidden)),
          down_bias(cell.optional_numbers(DOWN_BIAS, width)),
          up{cell.numbers(UP, width, hidden), width, hidden,
             cell.optional_numbers(UP_BIAS, hidden), nullptr} {
        cell.require(activation >= 0 && activation < ACTIVATIONS, "a cell names no activation");
        cell.require(source >= 0 && source < SOURCES, "a cell names no source");
    }
};

template <class T>
struct Unit {
    Adapter<T> adapter;
    Matrix<T> out;
    Matrix<const T> h, r;
    int64_t rows;
    float weight;

    int64_t scratch() const {
        return rows * (adapter.width + (adapter.source == SUM ? adapter.hidden : 0));
    }
};

// h + r rounded to T, as the base rounds its residual stream.
template <class T>
Matrix<const T> sum_of(const Unit<T>& unit, T* sums) {
    const int64_t size = unit.adapter.hidden;
    for (int64_t row = 0; row < unit.rows; ++row)
        for_groups(size, LANES, [&](int64_t i, auto... n) {
            const Floats sum = load(unit.h.row(row) + i, n...) + load(unit.r.row(row) + i, n...);
            store(sums + row * size + i, sum, n...);
        });
    return {sums, size};
}

template <class T>
Matrix<const T> source_of(const Unit<T>& unit, float* scratch) {
    switch (unit.adapter.source) {
        case OUTPUT: return unit.h;
        case RESIDUAL: return unit.r;
        default: return sum_of(unit, reinterpret_cast<T*>(scratch));
    }
}

template <class T, class F>
void map(const Unit<T>& unit, Matrix<float> inner, F f) {
    const T* bias = unit.adapter.down_bias;
    for (int64_t row = 0; row < unit.rows; ++row)
        for_groups(unit.adapter.width, LANES, [&](int64_t i, auto... n) {
            const Floats z = load(inner.row(row) + i, n...);
            store(inner.row(row) + i, unit.weight * f(bias ? z + load(bias + i, n...) : z), n...);
        });
}

template <class T>
void activate(const Unit<T>& unit, Matrix<float> inner) {
    switch (unit.adapter.activation) {
        case LINEAR: return map(unit, inner, [](Floats z) { return z; });
        case RELU: return map(unit, inner, [](Floats z) { return relu(z); });
        case SILU: return map(unit, inner, [](Floats z) { return silu(z); });
        case GELU: return map(unit, inner, [](Floats z) { return gelu(z); });
        case GELU_TANH: return map(unit, inner, [](Floats z) { return gelu_tanh(z); });
        case TANH: return map(unit, inner, [](Floats z) { return tanh(z); });
        case SIGMOID: return map(unit, inner, [](Floats z) { return sigmoid(z); });
        case LEAKY_RELU: return map(unit, inner, [](Floats z) { return leaky_relu(z); });
        case GELU_QUICK: return map(unit, inner, [](Floats z) { return gelu_quick(z); });
        case RELU6: return map(unit, inner, [](Floats z) { return relu6(z); });
        case RELU_SQUARED: return map(unit, inner, [](Floats z) { return relu_squared(z); });
    }
}

template <class T>
void compute(const Unit<T>& unit, float* scratch) {
    const Adapter<T>& adapter = unit.adapter;
    const Matrix<float> inner{scratch, adapter.width};
    const Matrix<const T> z = source_of(unit, scratch + unit.rows * adapter.width);
    dots(z, unit.rows, adapter.down, adapter.width, adapter.hidden, inner);
    activate(unit, inner);
    expand_rows<false>(adapter.up, inner, unit.out, unit.rows, unit.weight);
}

template <class T>
const char* add_bottleneck(Matrix<T> out, Matrix<const T> h, Matrix<const T> r, int64_t rows,
                           int64_t hidden, const Table& table, int64_t place,
                           const Segments& segments, int64_t threads) {
    std::vector<Unit<T>> units;
    int64_t scratch = 0;
    const auto add = [&](Cell<T>& cell, int64_t start, int64_t end, float weight) {
        const Adapter<T> adapter(cell, hidden);
        if (cell.error) return;
        for (int64_t row = start; row < end; row += BLOCK_ROWS) {
            units.push_back({adapter, out.from(row), h.from(row), r.from(row),
                             min_of(BLOCK_ROWS, end - row), weight});
            scratch = max_of(scratch, units.back().scratch());
        }
    };
    if (const char* error = for_each_cell<T>(table, place, segments, rows, add)) return error;
    return run_units(units, scratch, threads, [](const Unit<T>& unit, float* own) {
        compute(unit, own);
        return static_cast<const char*>(nullptr);
    });
}

}  // namespace

#define EXPORT(DTYPE, T)                                                                           \
    extern "C" const char* add_bottleneck_##DTYPE(                                                 \
        void* out, const void* h, const void* r, int64_t rows, int64_t hidden, const Table* table, \
        int64_t place, const Segments* segments, int64_t threads) {                                \
        return add_bottleneck<T>({static_cast<T*>(out), hidden},                                   \
                                 {static_cast<const T*>(h), hidden},                               \
                                 {static_cast<const T*>(r), hidden}, rows, hidden, *table, place,  \
                                 *segments, threads);                                              \
    }                                                                                              \
    EXPORT_PACKED(add_bottleneck_##DTYPE)

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
