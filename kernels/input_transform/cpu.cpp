// transform_input on the CPU. A unit of work is up to BLOCK_ROWS rows of one segment, held as float32 in
// two buffers that a stage reads and writes in turn. Each element of a rotated block has one
// accumulator that runs over its sum in order.
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
    void rotate(Matrix<float> z, const T* r, int64_t rows, Matrix<float> out, float* padded_r) const {
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
