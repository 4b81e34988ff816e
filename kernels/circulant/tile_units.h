// What the matrix unit computes of a call of add_circulant, in units of up to sixteen rows of K. The
// rows of several targets lie one behind the other where their cells do, and then share tiles: those
// of K that has only three rows of its own take as long to multiply as full ones.
#pragma once

#include <algorithm>
#include <vector>

#include "matrix_tiles.h"

#ifdef HAS_AMX

inline bool on_tiles(const CirculantKernel<float>&) { return false; }

inline bool on_tiles(const CirculantKernel<bfloat16>& kernel) {
    return matrix_unit() && MatrixCirculant::fits(kernel);
}

class CirculantUnits {
    // One segment's adapter at one target.
    struct Part {
        CirculantKernel<bfloat16> kernel;
        int64_t start, width;  // columns of y
    };

    const LinearCall<bfloat16>& call;
    std::vector<Part> parts;
    std::vector<CirculantUnit> units;
    int64_t sums_size = 0, halves_size = 0;

  public:
    bool others = false;  // Whether there are cells that tiles do not fit.

    explicit CirculantUnits(const LinearCall<bfloat16>& call) : call(call) {}

    // Finds the units and checks all cells. Returns what was wrong, or null.
    const char* find() {
        const Segments& all = call.segments;
        for (int64_t i = 0; i < all.count; ++i) {
            const Segments segment{1, all.start + i, all.end + i, all.adapter_slot + i,
                                   all.weight + i};
            if (const char* error = find_parts(segment)) return error;
            std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) {
                return a.kernel.numbers < b.kernel.numbers;
            });
            cut_parts(*segment.start, *segment.end, *segment.weight);
        }
        return nullptr;
    }

    void compute() const {
        const CirculantUnit* end = units.data() + units.size();
        share_tasks(end - units.data(), call.threads, [&](Tasks& tasks) {
            MatrixCirculant worker(sums_size, halves_size, end);
            tasks.each([&](int64_t i) { worker.compute(units[i]); });
        });
    }

  private:
    const char* find_parts(const Segments& segment) {
        parts.clear();
        for (int64_t t = 0; t < call.targets.count; ++t) {
            const int64_t start = call.targets.out_starts[t], width = call.targets.out_sizes[t];
            if (!inside(start, width, call.out_size))
                return "a target reaches outside the output's columns";
            const auto add = [&](Cell<bfloat16>& cell, int64_t, int64_t, float) {
                const auto kernel = kernel_of(cell, call.in_size, width);
                if (cell.error) return;
                if (MatrixCirculant::fits(kernel)) parts.push_back({kernel, start, width});
                else others = true;
            };
            const char* error = for_each_cell<bfloat16>(call.table, call.targets.first + t, segment,
                                                        call.rows, add);
            if (error) return error;
        }
        return nullptr;
    }

    // Units of the parts, sorted by address, for the rows begin .. end - 1.
    void cut_parts(int64_t begin, int64_t end, float weight) {
        CirculantUnit unit;
        unit.count = 0;
        unit.weight = weight;
        for (const Part& part : parts) {
            const int64_t b = part.kernel.b;
            for (int64_t column = 0; column < part.width; column += b) {
                const bfloat16* numbers = part.kernel.rows(column);
                if (unit.count > 0 && !continued(unit, b, numbers)) {
                    add(unit, begin, end);
                    unit.count = 0;
                }
                if (unit.count == 0) unit.kernel = {b, call.in_size, numbers};
                unit.columns[unit.count++] = part.start + column;
            }
        }
        if (unit.count > 0) add(unit, begin, end);
    }

    // Whether this row of K can be the unit's next.
    static bool continued(const CirculantUnit& unit, int64_t b, const bfloat16* numbers) {
        return unit.count < TILE_ROWS && unit.kernel.b == b &&
               unit.kernel.numbers + unit.count * unit.kernel.in_size == numbers;
    }

    // The unit for these rows of x: in blocks of sixteen, or fewer so that all threads have some.
    void add(CirculantUnit unit, int64_t begin, int64_t end) {
        const int64_t step = min_of(TILE_ROWS, div_up(end - begin, 2 * max_of(1, call.threads)));
        for (int64_t row = begin; row < end; row += step) {
            unit.y = call.y.from(row);
            unit.x = call.x.from(row);
            unit.rows = min_of(step, end - row);
            units.push_back(unit);
        }
        sums_size = max_of(sums_size, MatrixCirculant::sums_size(unit.kernel.b));
        halves_size = max_of(halves_size, MatrixCirculant::halves_size(unit.kernel.b));
    }
};

// The call on the matrix unit; with `correct_others` for the cells that its tiles do not fit, if any.
inline const char* add_on_tiles(const LinearCall<bfloat16>& call,
                                const char* correct_others(const LinearCall<bfloat16>&)) {
    CirculantUnits units(call);
    if (const char* error = units.find()) return error;
    if (units.others)
        if (const char* error = correct_others(call)) return error;
    units.compute();
    return nullptr;
}

#else

template <class W>
bool on_tiles(const CirculantKernel<W>&) {
    return false;
}

#endif
