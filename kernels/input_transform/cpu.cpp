// transform_input on the CPU. A unit of work is up to BLOCK_ROWS rows of one segment, held as float32 in
// two buffers that a stage reads and writes in turn. Each element of a rotated block has one
// accumulator that runs over its sum in order. A row alone is multiplied by R as it lies; for several
// rows, R is first widened. With it, spread_rows and collect_outputs, which copy rows.
#include <utility>

#include "../cpu/products.h"
#include "../cpu/program.h"
#include "../cpu/tables.h"

namespace {

constexpr int64_t BLOCK_ROWS = 16;

template <class T>
struct Transform {
    int64_t stages, num_blocks, block, size;
    const T* rotations;
    const int32_t* permutations;
    const T* scale;

    Transform(Cell<T>& cell, int64_t size)
        : stages(cell[0]), num_blocks(cell[1]), block(cell[2]), size(size),
          rotations(stages ? cell.numbers(3, stages, num_blocks, block, block) : nullptr),
          permutations(stages ? cell.optional_indices(4, stages, size) : nullptr),
          scale(cell.optional_numbers(5, size)) {
        const bool fit = block > 0 && size % block == 0 &&
                         (num_blocks == 1 || num_blocks == size / block);
        cell.require(!stages || fit, "a rotation's blocks do not make up the input");
    }

    // What a rotated block's last vector holds beyond the block lies over the next one's place, which
    // is written later, or in the LANES behind the last.
    int64_t stride() const { return size + LANES; }
    int64_t scratch() const {
        return 2 * BLOCK_ROWS * stride() + (stages ? block * padded(block) : 0);
    }

    const char* compute(Matrix<T> x, int64_t rows, float* scratch) const {
        if (permutations && !all_below(permutations, stages * size, size))
            return "a permutation has an index outside the input";
        Matrix<float> current{scratch, stride()}, other{current.row(BLOCK_ROWS), stride()};
        float* rotation = other.row(BLOCK_ROWS);
        load_rows(x, rows, current);
        for (int64_t stage = 0; stage < stages; ++stage) {
            const T* r = rotations + stage * num_blocks * block * block;
            if (permutations) {
                const int32_t* p = permutations + stage * size;
                gather(current, p, rows, other);
                rotate(other, r, rows, current, rotation);
                scatter(current, p, rows, other);
            } else {
                rotate(current, r, rows, other, rotation);
            }
            std::swap(current, other);
        }
        for (int64_t row = 0; row < rows; ++row)
            for_groups(size, LANES, [&](int64_t i, auto... n) {
                store(x.row(row) + i, load(current.row(row) + i, n...), n...);
            });
        return nullptr;
    }

   private:
    void load_rows(Matrix<T> x, int64_t rows, Matrix<float> out) const {
        for (int64_t row = 0; row < rows; ++row)
            for_groups(size, LANES, [&](int64_t i, auto... n) {
                const Floats v = load(x.row(row) + i, n...);
                store(out.row(row) + i, scale ? v * load(scale + i, n...) : v, n...);
            });
    }

    // out = z, every block multiplied by its own of R, or by the only one
    void rotate_row(const float* z, const T* r, float* out) const {
        for (int64_t k = 0; k * block < size; ++k, z += block, out += block) {
            int64_t i = 0;
            for (; i + COLS * LANES <= block; i += COLS * LANES) rotated<COLS>(z, r + i, out + i);
            for_groups(block - i, LANES,
                       [&](int64_t j, auto... n) { rotated<1>(z, r + i + j, out + i + j, n...); });
            if (num_blocks > 1) r += block * block;
        }
    }

    // C vectors of columns; n, where given, is how many there are of a single one.
    template <int C, class... N>
    INLINE_MEMBER void rotated(const float* z, const T* r, float* out, N... n) const {
        Floats acc[C] = {};
        for (int64_t k = 0; k < block; ++k, r += block)
            for (int c = 0; c < C; ++c) acc[c] += z[k] * load(r + c * LANES, n...);
        for (int c = 0; c < C; ++c) store(out + c * LANES, acc[c], n...);
    }

    void rotate(Matrix<float> z, const T* r, int64_t rows, Matrix<float> out, float* padded_r) const {
        if (rows == 1) return rotate_row(z.data, r, out.data);
        for (int64_t k = 0; k * block < size; ++k) {
            if (k < num_blocks) pad(r + k * block * block, padded_r);
            combine(z.from(0, k * block), rows, {padded_r, padded(block)}, block, block,
                    out.from(0, k * block));
        }
    }

    void pad(const T* r, float* out) const {
        for (int64_t i = 0; i < block; ++i) widen(r + i * block, block, out + i * padded(block));
    }

    void gather(Matrix<float> x, const int32_t* p, int64_t rows, Matrix<float> out) const {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < size; ++i) out.row(row)[i] = x.row(row)[p[i]];
    }

    void scatter(Matrix<float> z, const int32_t* p, int64_t rows, Matrix<float> out) const {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < size; ++i) out.row(row)[p[i]] = z.row(row)[i];
    }
};

template <class T>
struct Unit {
    Transform<T> transform;
    Matrix<T> x;
    int64_t rows;
};

template <class T>
const char* transform_input(Matrix<T> x, int64_t rows, int64_t size, const Table& table,
                            int64_t place, const Segments& segments, int64_t threads) {
    std::vector<Unit<T>> units;
    int64_t scratch = 0;
    const auto add = [&](Cell<T>& cell, int64_t start, int64_t end, float) {
        const Transform<T> transform(cell, size);
        if (cell.error) return;
        scratch = max_of(scratch, transform.scratch());
        for (int64_t row = start; row < end; row += BLOCK_ROWS)
            units.push_back({transform, x.from(row), min_of(BLOCK_ROWS, end - row)});
    };
    if (const char* error = for_each_cell<T>(table, place, segments, rows, add)) return error;
    return run_units(units, scratch, threads, [](const Unit<T>& unit, float* own) {
        return unit.transform.compute(unit.x, unit.rows, own);
    });
}

constexpr int64_t SERIAL_ROWS = 64;  // below this, waking threads costs more than it saves

template <class T>
void copy_row(T* to, const T* from, int64_t size) {
    std::memcpy(to, from, size * sizeof(T));
}

bool all_inside(const int64_t* chosen, int64_t count, int64_t rows) {
    bool found = true;
    for (int64_t i = 0; i < count; ++i) found &= inside(chosen[i], 1, rows);
    return found;
}

template <class T>
const char* spread_rows(T* wide, Matrix<const T> x, int64_t rows, int64_t size,
                        const int64_t* chosen, int64_t count, int64_t copies, int64_t threads) {
    if (!all_inside(chosen, count, rows)) return "a chosen row is none of the batch's";
    const int64_t all = rows + copies * count;
    for_each_task(all, all < SERIAL_ROWS ? 1 : threads, [=](int64_t i) {
        copy_row(wide + i * size, x.row(i < rows ? i : chosen[(i - rows) % count]), size);
    });
    return nullptr;
}

template <class T>
const char* collect_outputs(Matrix<T> y, int64_t rows, int64_t size, const int64_t* chosen,
                            int64_t count, const Targets& targets, int64_t threads) {
    if (!all_inside(chosen, count, rows)) return "a chosen row is none of the batch's";
    for (int64_t t = 1; t < targets.count; ++t)
        if (!inside(targets.out_starts[t], targets.out_sizes[t], size))
            return "a target reaches outside the output's columns";
    const int64_t all = (targets.count - 1) * count;
    for_each_task(all, all < SERIAL_ROWS ? 1 : threads, [=, &targets](int64_t i) {
        const int64_t target = 1 + i / count, start = targets.out_starts[target];
        copy_row(y.row(chosen[i % count]) + start, y.row(rows + i) + start,
                 targets.out_sizes[target]);
    });
    return nullptr;
}

}  // namespace

#define EXPORT(NAME, T)                                                                             \
    extern "C" const char* NAME(void* x, int64_t x_stride, int64_t rows, int64_t size,              \
                                const Table* table, int64_t place, const Segments* segments,        \
                                int64_t threads) {                                                  \
        return transform_input<T>({static_cast<T*>(x), x_stride}, rows, size, *table, place,        \
                                  *segments, threads);                                              \
    }                                                                                               \
    EXPORT_PACKED(NAME)

EXPORT(transform_input_float32, float)
EXPORT(transform_input_bfloat16, bfloat16)

#define EXPORT_SPREAD(NAME, T)                                                                      \
    extern "C" const char* NAME(void* wide, const void* x, int64_t x_stride, int64_t rows,          \
                                int64_t size, const int64_t* chosen, int64_t count, int64_t copies, \
                                int64_t threads) {                                                  \
        return spread_rows<T>(static_cast<T*>(wide), {static_cast<const T*>(x), x_stride}, rows,    \
                              size, chosen, count, copies, threads);                                \
    }                                                                                               \
    EXPORT_PACKED(NAME)

EXPORT_SPREAD(spread_rows_float32, float)
EXPORT_SPREAD(spread_rows_bfloat16, bfloat16)

#define EXPORT_COLLECT(NAME, T)                                                                     \
    extern "C" const char* NAME(void* y, int64_t rows, int64_t size, const int64_t* chosen,         \
                                int64_t count, const Targets* targets, int64_t threads) {           \
        return collect_outputs<T>({static_cast<T*>(y), size}, rows, size, chosen, count, *targets,  \
                                  threads);                                                         \
    }                                                                                               \
    EXPORT_PACKED(NAME)

EXPORT_COLLECT(collect_outputs_float32, float)
EXPORT_COLLECT(collect_outputs_bfloat16, bfloat16)
