// What kernels are given of a batch's adapters (kernels/tables.py), and how it becomes units of work:
//   for_each_cell  finds the adapters of a place of the base and checks every size and offset,
//   run_units      computes the units in parallel, each thread with scratch of its own,
//   correct_linear does both for the operations y (rows, out) += f(x (rows, in)) on linear modules.
// Nothing is written before everything that was found has been checked.
#pragma once

#include <atomic>
#include <memory>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "program.h"
#include "simd.h"

// ---- Mirrored field by field in corrections.py; the meanings stand in tables.py.

struct Table {
    const int64_t* cells;
    int64_t rows, slots, fields;
    const void* numbers;
    int64_t num_numbers;
    const int32_t* indices;
    int64_t num_indices;
};

struct Targets {
    int64_t first, count;
    const int64_t *out_starts, *out_sizes;
};

struct Segments {
    int64_t count;
    const int32_t *start, *end, *adapter_slot;
    const float* weight;
};

// ---- Rows of a matrix that is dense in its last dimension.

template <class T>
struct Matrix {
    T* data;
    int64_t stride;
    T* row(int64_t i) const { return data + i * stride; }
    Matrix from(int64_t i, int64_t column = 0) const { return {row(i) + column, stride}; }
    operator Matrix<const T>() const { return {data, stride}; }
};

INLINE bool inside(int64_t offset, int64_t count, int64_t size) {
    return offset >= 0 && count >= 0 && offset <= size - count;
}

// The product of sizes; -1, which is inside of nothing, if one is negative or it overflows.
template <class... Sizes>
INLINE int64_t product_of(Sizes... sizes) {
    int64_t product = 1;
    bool valid = true;
    for (const int64_t size : {static_cast<int64_t>(sizes)...})
        valid = valid && size >= 0 && !__builtin_mul_overflow(product, size, &product);
    return valid ? product : -1;
}

// Whether every index is in 0 .. size - 1.
INLINE bool all_below(const int32_t* indices, int64_t count, int64_t size) {
    uint32_t largest = 0;  // in which a negative one is larger than any size
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t index = static_cast<uint32_t>(indices[i]);
        largest = index > largest ? index : largest;
    }
    return count == 0 || largest < size;
}

// One non-empty cell, whose tensors of T lie in the pool. What is found wrong is kept in `error`; a
// tensor that lies outside the pool comes out as null.
template <class T>
class Cell {
   public:
    Cell(const Table& table, const int64_t* fields) : table_(table), fields_(fields) {}

    int64_t operator[](int64_t field) {
        if (field < table_.fields) return fields_[field];
        error = "a table's cells have too few fields";
        return -1;
    }

    // The tensor of product(sizes) elements whose offset the field is.
    template <class... Sizes>
    const T* numbers(int64_t field, Sizes... sizes) {
        const T* pool = static_cast<const T*>(table_.numbers);
        return located(pool, table_.num_numbers, (*this)[field], product_of(sizes...));
    }

    // The same, where a negative field stands for no tensor: null.
    template <class... Sizes>
    const T* optional_numbers(int64_t field, Sizes... sizes) {
        return (*this)[field] < 0 ? nullptr : numbers(field, sizes...);
    }

    template <class... Sizes>
    const int32_t* indices(int64_t field, Sizes... sizes) {
        return located(table_.indices, table_.num_indices, (*this)[field], product_of(sizes...));
    }

    template <class... Sizes>
    const int32_t* optional_indices(int64_t field, Sizes... sizes) {
        return (*this)[field] < 0 ? nullptr : indices(field, sizes...);
    }

    void require(bool met, const char* message) {
        if (!met) error = message;
    }

    const char* error = nullptr;

   private:
    template <class E>
    const E* located(const E* pool, int64_t size, int64_t offset, int64_t count) {
        if (inside(offset, count, size)) return pool + offset;
        error = "an adapter's weights reach outside the pool";
        return nullptr;
    }

    const Table& table_;
    const int64_t* fields_;
};

// Calls body(cell, start, end, weight) for every segment of `rows` rows that is not empty and whose
// adapter has a cell in row `place` of the table. Returns what was wrong, or null.
template <class T, class Body>
const char* for_each_cell(const Table& table, int64_t place, const Segments& segments, int64_t rows,
                          Body body) {
    if (!inside(place, 1, table.rows)) return "a target lies outside the table's rows";
    if (table.fields == 0) return "a table's cells have too few fields";
    for (int64_t i = 0; i < segments.count; ++i) {
        const int64_t start = segments.start[i], end = segments.end[i];
        const int64_t slot = segments.adapter_slot[i];
        if (!inside(start, end - start, rows)) return "a segment reaches outside the batch's rows";
        if (!inside(slot, 1, table.slots)) return "a segment names an adapter slot outside the table";
        const int64_t* fields = table.cells + (place * table.slots + slot) * table.fields;
        if (start == end || fields[0] < 0) continue;
        Cell<T> cell(table, fields);
        body(cell, start, end, segments.weight[i]);
        if (cell.error) return cell.error;
    }
    return nullptr;
}

// Calls compute(unit, scratch) for every unit; `scratch` is the running thread's own, as many floats
// as asked for, with no value, from the beginning of a line of cache: vectors that lie across two lines
// take twice as long. compute returns what it found wrong in index tensors, or null; so does
// this, when all units have run.
template <class Unit, class Compute>
const char* run_units(const std::vector<Unit>& units, int64_t scratch, int64_t threads,
                      Compute compute) {
    std::atomic<const char*> found{nullptr};
    const int64_t count = static_cast<int64_t>(units.size());
    share_tasks(count, threads, [&](Tasks& tasks) {
        const std::unique_ptr<float[]> own(new float[scratch + LANES]);
        void* start = own.get();
        size_t room = (scratch + LANES) * sizeof(float);
        std::align(LANES * sizeof(float), scratch * sizeof(float), start, room);
        tasks.each([&](int64_t i) {
            if (const char* error = compute(units[i], static_cast<float*>(start))) found = error;
        });
    });
    return found;
}

// The same with a worker of each thread's own, that is made of `room`.
template <class Worker, class Unit, class Room, class AheadOf>
const char* run_workers(const std::vector<Unit>& units, const Room& room, int64_t threads,
                        AheadOf ahead_of) {
    std::atomic<const char*> found{nullptr};
    share_tasks(static_cast<int64_t>(units.size()), threads, [&](Tasks& tasks) {
        Worker worker(room);
        tasks.each([&](int64_t i) {
            const Unit& unit = units[i];
            if (const char* error = worker.take(unit.op, unit.block, ahead_of(unit))) found = error;
        });
        worker.finish();
    });
    return found;
}

// ---- Corrections of linear modules: y (rows, out) is changed in place, x (rows, in) read.

// What a unit computes: columns column .. column + columns of one target for some rows of a segment.
// y begins at the target's first column, not at the unit's.
template <class T>
struct Block {
    Matrix<T> y;
    Matrix<const T> x;
    int64_t rows, column, columns;
    float weight;
};

// What the next unit reads, to be brought near while this one is computed.
class Ahead {
  public:
    Ahead() = default;
    template <class W>
    Ahead(const W* from, int64_t count) : first(from, count) {}
    template <class W>
    Ahead(const W* from, int64_t count, const W* then, int64_t more)
        : first(from, count), second(then, more) {}

    // How near: into the cache's second level, or its first.
    static constexpr int NEAR = 2, NEAREST = 3;

    // Asks for some lines more; does nothing when all have been asked for.
    template <int LEVEL = NEAR>
    INLINE_MEMBER void fetch(int64_t lines) {
        first.fetch<LEVEL>(lines);
        second.fetch<LEVEL>(lines);
    }

  private:
    struct Range {
        const char *next = nullptr, *end = nullptr;

        Range() = default;
        template <class W>
        Range(const W* from, int64_t count)
            : next(reinterpret_cast<const char*>(from)), end(next + count * sizeof(W)) {}

        template <int LEVEL>
        INLINE_MEMBER void fetch(int64_t& lines) {
            for (; lines > 0 && next < end; --lines, next += LINE)
                __builtin_prefetch(next, 0, LEVEL);
        }
    };
    static constexpr int64_t LINE = 64;
    Range first, second;
};

template <class T>
struct LinearCall {
    Matrix<T> y;
    Matrix<const T> x;
    int64_t rows, in_size, out_size;
    const Table& table;
    const Targets& targets;
    const Segments& segments;
    int64_t threads;
};

// Runs an operation over rows of T with weights of W. Op is the adapter's part at one target:
//   Op(Cell<W>& cell, int64_t in_size, int64_t out_size)         reads and checks a cell,
//   static constexpr int64_t BLOCK_ROWS                          rows of a unit, at most,
//   int64_t columns() const                                      what is split into units: out_size,
//   int64_t block_columns() const                                columns of a unit, at most,
//   int64_t scratch() const                                      floats that a unit needs,
//   const char* compute(const Block<T>&, float* scratch) const   the unit; what was wrong, or null,
// or, where memory is what it waits for,
//   Ahead reads(const Block<T>&) const                           what compute reads of the adapter,
//   const char* compute(const Block<T>&, float* scratch, Ahead) const   with that of the next unit.
// or, where a unit's work goes on while the next one's begins, besides reads,
//   Room scratch() const                                         that max_of adds up over all units,
//   class Worker                                                 of a thread, made of that Room:
//     const char* take(const Op&, const Block<T>&, Ahead)        begins a unit,
//     void finish()                                              ends all of them.
template <class Op, class = void>
constexpr bool FETCHES = false;
template <class Op>
constexpr bool FETCHES<Op, std::void_t<decltype(&Op::reads)>> = true;

template <class Op, class = void>
constexpr bool HAS_WORKER = false;
template <class Op>
constexpr bool HAS_WORKER<Op, std::void_t<typename Op::Worker>> = true;

template <class Op, class W, class T>
const char* correct_linear(const LinearCall<T>& call) {
    struct Unit {
        Op op;
        Block<T> block;
    };
    std::vector<Unit> units;
    units.reserve(call.targets.count * call.segments.count);
    decltype(std::declval<Op>().scratch()) scratch{};
    for (int64_t t = 0; t < call.targets.count; ++t) {
        const int64_t start = call.targets.out_starts[t], width = call.targets.out_sizes[t];
        if (!inside(start, width, call.out_size))
            return "a target reaches outside the output's columns";
        const auto add = [&](Cell<W>& cell, int64_t begin, int64_t end, float weight) {
            const Op op(cell, call.in_size, width);
            if (cell.error) return;
            scratch = max_of(scratch, op.scratch());
            const int64_t columns = op.columns(), step = op.block_columns();
            for (int64_t column = 0; column < columns; column += step)
                for (int64_t row = begin; row < end; row += Op::BLOCK_ROWS)
                    units.push_back({op,
                                     {call.y.from(row, start), call.x.from(row),
                                      min_of(Op::BLOCK_ROWS, end - row), column,
                                      min_of(step, columns - column), weight}});
        };
        const char* error = for_each_cell<W>(call.table, call.targets.first + t, call.segments,
                                             call.rows, add);
        if (error) return error;
    }
    const auto ahead_of = [&](const auto& unit) {
        const auto* next = &unit + 1;  // most likely this thread's
        return next == units.data() + units.size() ? Ahead() : next->op.reads(next->block);
    };
    if constexpr (HAS_WORKER<Op>)
        return run_workers<typename Op::Worker>(units, scratch, call.threads, ahead_of);
    else
        return run_units(units, scratch, call.threads, [&](const Unit& unit, float* own) {
            if constexpr (FETCHES<Op>) return unit.op.compute(unit.block, own, ahead_of(unit));
            else return unit.op.compute(unit.block, own);
        });
}

// The C function that corrections.py calls: over rows of T, with a function of a LinearCall<T>.
#define EXPORT_CORRECTION(NAME, T, ...)                                                            \
    extern "C" const char* NAME(void* y, int64_t y_stride, const void* x, int64_t x_stride,        \
                                int64_t rows, int64_t in_size, int64_t out_size,                   \
                                const Table* table, const Targets* targets,                        \
                                const Segments* segments, int64_t threads) {                       \
        const LinearCall<T> call{{static_cast<T*>(y), y_stride},                                   \
                                 {static_cast<const T*>(x), x_stride},                             \
                                 rows, in_size, out_size, *table, *targets, *segments, threads};   \
        return __VA_ARGS__(call);                                                                  \
    }                                                                                              \
    EXPORT_PACKED(NAME)

// The same for OP, a template over T and W as correct_linear has it.
#define EXPORT_LINEAR(NAME, OP, T, W) EXPORT_CORRECTION(NAME, T, correct_linear<OP<T, W>, W, T>)
