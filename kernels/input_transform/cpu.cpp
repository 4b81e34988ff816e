// transform_inputs on the CPU. A unit of work is up to BLOCK_ROWS rows of one segment and one target, or
// rows that the target takes as they are. Rotated rows are held as float32 in two buffers that a stage
// reads and writes in turn. Each element of a rotated block has one accumulator that runs over its sum
// in order. A row alone is multiplied by R as it lies; for several rows, R is first widened.
#include <algorithm>
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

    explicit Transform(int64_t size)  // that changes nothing
        : stages(0), num_blocks(0), block(0), size(size), rotations(nullptr), permutations(nullptr),
          scale(nullptr) {}

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
        return stages ? 2 * BLOCK_ROWS * stride() + block * padded(block) : 0;
    }

    // The larger part of it.
    Ahead reads() const {
        return stages ? Ahead(rotations, stages * num_blocks * block * block)
                      : Ahead(scale, scale ? size : 0);
    }

    const char* compute(Matrix<const T> x, Matrix<T> out, int64_t rows, float* scratch,
                        Ahead next) const {
        if (!stages) {
            next.fetch(size);
            copy_rows(x, rows, out);
            return nullptr;
        }
        if (permutations && !all_below(permutations, stages * size, size))
            return "a permutation has an index outside the input";
        Matrix<float> current{scratch, stride()}, other{current.row(BLOCK_ROWS), stride()};
        float* rotation = other.row(BLOCK_ROWS);
        copy_rows(x, rows, current);
        for (int64_t stage = 0; stage < stages; ++stage) {
            const T* r = rotations + stage * num_blocks * block * block;
            if (permutations) {
                const int32_t* p = permutations + stage * size;
                gather(current, p, rows, other);
                rotate(other, r, rows, current, rotation, next);
                scatter(current, p, rows, other);
            } else {
                rotate(current, r, rows, other, rotation, next);
            }
            std::swap(current, other);
        }
        for (int64_t row = 0; row < rows; ++row)
            for_groups(size, LANES, [&](int64_t i, auto... n) {
                store(out.row(row) + i, load(current.row(row) + i, n...), n...);
            });
        return nullptr;
    }

   private:
    // out = s * x
    template <class O>
    void copy_rows(Matrix<const T> x, int64_t rows, Matrix<O> out) const {
        for (int64_t row = 0; row < rows; ++row)
            for_groups(size, LANES, [&](int64_t i, auto... n) {
                const Floats v = load(x.row(row) + i, n...);
                store(out.row(row) + i, scale ? v * load(scale + i, n...) : v, n...);
            });
    }

    // out = z, every block multiplied by its own of R, or by the only one
    void rotate_row(const float* z, const T* r, float* out, Ahead& next) const {
        for (int64_t k = 0; k * block < size; ++k, z += block, out += block) {
            next.fetch(lines());
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

    // Of a block's rotation, and one for the unit's end.
    int64_t lines() const { return block * block * static_cast<int64_t>(sizeof(T)) / 64 + 1; }

    void rotate(Matrix<float> z, const T* r, int64_t rows, Matrix<float> out, float* padded_r,
                Ahead& next) const {
        if (rows == 1) return rotate_row(z.data, r, out.data, next);
        for (int64_t k = 0; k * block < size; ++k) {
            next.fetch(lines());
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
    Matrix<const T> x;
    Matrix<T> out;
    int64_t rows;
};

// Input t of the targets, out (rows, size), begins t * plane behind `out`.
template <class T>
const char* transform_inputs(T* out, int64_t plane, Matrix<const T> x, int64_t rows, int64_t size,
                             const Table& table, const Targets& targets, const Segments& segments,
                             int64_t threads) {
    std::vector<Unit<T>> units;
    std::vector<char> done(rows);  // as the target wants them
    for (int64_t t = 0; t < targets.count; ++t) {
        const Matrix<T> input{out + t * plane, size};
        const auto add = [&](const Transform<T>& transform, int64_t start, int64_t end) {
            for (int64_t row = start; row < end; row += BLOCK_ROWS)
                units.push_back({transform, x.from(row), input.from(row),
                                 min_of(BLOCK_ROWS, end - row)});
        };
        std::fill(done.begin(), done.end(), 0);
        const auto found = [&](Cell<T>& cell, int64_t start, int64_t end, float) {
            const Transform<T> transform(cell, size);
            if (cell.error) return;
            add(transform, start, end);
            std::fill(done.begin() + start, done.begin() + end, 1);
        };
        const char* error = for_each_cell<T>(table, targets.first + t, segments, rows, found);
        if (error) return error;
        for (int64_t row = 0, end; row < rows; row = end) {
            for (end = row + 1; end < rows && done[end] == done[row];) ++end;
            if (!done[row]) add(Transform<T>(size), row, end);
        }
    }
    int64_t scratch = 0;
    for (const Unit<T>& unit : units) scratch = max_of(scratch, unit.transform.scratch());
    return run_units(units, scratch, threads, [&](const Unit<T>& unit, float* own) {
        const Unit<T>* next = &unit + 1;  // most likely this thread's
        const bool last = next == units.data() + units.size();
        return unit.transform.compute(unit.x, unit.out, unit.rows, own,
                                      last ? Ahead() : next->transform.reads());
    });
}

}  // namespace

#define EXPORT(NAME, T)                                                                             \
    extern "C" const char* NAME(void* out, int64_t plane, const void* x, int64_t x_stride,          \
                                int64_t rows, int64_t size, const Table* table,                     \
                                const Targets* targets, const Segments* segments,                   \
                                int64_t threads) {                                                  \
        return transform_inputs<T>(static_cast<T*>(out), plane,                                     \
                                   {static_cast<const T*>(x), x_stride}, rows, size, *table,        \
                                   *targets, *segments, threads);                                   \
    }                                                                                               \
    EXPORT_PACKED(NAME)

EXPORT(transform_inputs_float32, float)
EXPORT(transform_inputs_bfloat16, bfloat16)
