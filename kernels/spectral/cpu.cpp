// add_spectral on the CPU. A unit of work is up to LANES rows, of whatever adapters, side by side: they
// are transformed together, once for all targets of the site, then each is multiplied by its own S, and
// the products of a target are transformed back together. Rows are multiplied side by side as well where
// all matrices have their entries at the same places, as those of one adapter do, and those of most
// adapters of one rank and seed; others one by one. Every number of a product has one accumulator that
// takes its entries in order, in either case.
#include <algorithm>

#include "../cpu/tables.h"
#include "fourier.h"
#include "product.h"

namespace {

// Rows that are transformed at once.
struct Group {
    int64_t count;
    int64_t rows[LANES];
};

template <class T>
class Spectral {
  public:
    explicit Spectral(const LinearCall<T>& call)
        : call(call), input(real_transform(call.in_size)),
          found(call.targets.count * call.rows, NONE) {}

    // Finds what is to be done; returns what is wrong with it, or null.
    const char* find() {
        parts.reserve(call.targets.count * call.segments.count);
        outputs.reserve(call.targets.count);
        for (int64_t t = 0; t < call.targets.count; ++t) {
            const int64_t width = call.targets.out_sizes[t];
            if (!inside(call.targets.out_starts[t], width, call.out_size))
                return "a target reaches outside the output's columns";
            outputs.push_back(transform_of(width));
            const auto add = [&](Cell<T>& cell, int64_t start, int64_t end, float weight) {
                const Entries<T> entries(cell, call.in_size, width);
                for (int64_t row = start; row < end; ++row)
                    found[t * call.rows + row] = static_cast<int32_t>(parts.size());
                parts.push_back({entries, weight});
            };
            const char* error = for_each_cell<T>(call.table, call.targets.first + t, call.segments,
                                                 call.rows, add);
            if (error) return error;
        }
        return nullptr;
    }

    std::vector<Group> groups() const {
        const Segments& segments = call.segments;
        int64_t rows = 0;
        for (int64_t i = 0; i < segments.count; ++i)
            if (has_part(i)) rows += segments.end[i] - segments.start[i];
        const int64_t most = max_of(1, min_of(LANES, div_up(rows, max_of(1, call.threads))));
        std::vector<Group> groups;
        Group rest{};
        for (int64_t i = 0; i < segments.count; ++i) {
            if (!has_part(i)) continue;
            int64_t row = segments.start[i];
            const int64_t end = segments.end[i];
            for (; row + most <= end; row += most) {  // of one adapter, where there are enough
                groups.push_back({most, {}});
                for (int64_t k = 0; k < most; ++k) groups.back().rows[k] = row + k;
            }
            for (; row < end; ++row) {
                rest.rows[rest.count++] = row;
                if (rest.count < most) continue;
                groups.push_back(rest);
                rest = {};
            }
        }
        if (rest.count) groups.push_back(rest);
        return groups;
    }

    // Floats for groups of so many rows.
    int64_t scratch(int64_t rows) const { return 6 * plane(lanes_for(rows)); }

    // Corrects the rows of one group; returns what is wrong in index tensors, or null.
    const char* compute(const Group& group, float* scratch) const {
        switch (lanes_for(group.count)) {
            case 4: return compute<4>(group, scratch);
            case 8: return compute<8>(group, scratch);
            default: return compute<16>(group, scratch);
        }
    }

  private:
    static constexpr int32_t NONE = -1;

    static int64_t lanes_for(int64_t rows) { return rows <= 4 ? 4 : rows <= 8 ? 8 : 16; }

    // A site's targets have few sizes, often that of the input.
    std::shared_ptr<const RealTransform> transform_of(int64_t size) const {
        if (size == call.in_size) return input;
        if (!outputs.empty() && outputs.back()->size == size) return outputs.back();
        return real_transform(size);
    }

    // Of up to W rows, each in one of W lanes.
    template <int W>
    const char* compute(const Group& group, float* scratch) const {
        const auto buffer = [&](int64_t i) {
            return Waves{scratch + 2 * i * plane(W), scratch + (2 * i + 1) * plane(W)};
        };
        Waves x = buffer(0), sums = buffer(1), other = buffer(2);
        load_columns<W>(group, x);
        const Bins<W> bins = input->to_spectrum<W>(x, other);
        Places places;
        Owners<T> owners, before = {};
        bool alike = false;
        for (int64_t t = 0; t < call.targets.count; ++t) {
            if (!find_owners(group, t, owners)) continue;
            if (!same_indices(owners, before)) {
                alike = same_places(owners, group.count);
                if (const char* error = check(owners, group.count, alike)) return error;
            }
            std::copy(owners, owners + LANES, before);
            const Bins<W> products{sums.re};
            std::fill_n(products.data, outputs[t]->bins() * 2 * W, 0.0f);
            if (alike) multiply_columns(owners, group.count, places, bins, products);
            else multiply_rows(owners, group.count, places, bins, products);
            outputs[t]->template to_numbers<W>(sums, other);
            add_columns<W>(group, t, owners, sums);
        }
        return nullptr;
    }

    // Of a row at a target; null, where its adapter has none.
    const Part<T>* part(int64_t t, int64_t row) const {
        const int32_t at = found[t * call.rows + row];
        return at == NONE ? nullptr : &parts[at];
    }

    bool has_part(int64_t segment) const {
        const int64_t row = call.segments.start[segment];
        bool any = false;
        for (int64_t t = 0; row < call.segments.end[segment] && t < call.targets.count; ++t)
            any = any || part(t, row);
        return any;
    }

    // Whether there are any.
    bool find_owners(const Group& group, int64_t t, Owners<T>& owners) const {
        bool any = false;
        for (int64_t k = 0; k < LANES; ++k) {
            owners[k] = k < group.count ? part(t, group.rows[k]) : nullptr;
            any = any || owners[k];
        }
        return any;
    }

    // Of the first `rows`, whose matrices may have been found to have the places of the first one.
    static const char* check(const Owners<T>& owners, int64_t rows, bool alike) {
        const Part<T>* last = nullptr;
        for (int64_t k = 0; k < rows; ++k) {
            if (!owners[k] || owners[k] == last || (alike && last)) continue;
            last = owners[k];
            if (const char* error = last->entries.check(0, last->entries.out_size)) return error;
        }
        return nullptr;
    }

    static bool same_places(const Owners<T>& owners, int64_t rows) {
        const Part<T>* first = first_of(owners);
        const Part<T>* last = first;
        for (int64_t k = 0; k < rows; ++k) {
            if (!owners[k] || owners[k] == last) continue;
            last = owners[k];
            if (!first->entries.same_places(last->entries)) return false;
        }
        return true;
    }

    // Whether all have the very index tensors that they had at another target.
    static bool same_indices(const Owners<T>& owners, const Owners<T>& others) {
        return std::equal(owners, owners + LANES, others, [](const Part<T>* a, const Part<T>* b) {
            if (!a || !b) return a == b;
            const Entries<T>&one = a->entries, &other = b->entries;
            return one.row_starts == other.row_starts && one.columns == other.columns &&
                   one.count == other.count && one.out_size == other.out_size;
        });
    }

    // Floats of half a buffer, for rows in so many lanes: not a power of two, so that what is read and
    // what is written do not lie a whole number of pages apart.
    int64_t plane(int64_t lanes) const {
        int64_t room = input->room();
        for (const auto& output : outputs) room = max_of(room, output->room());
        return lanes * padded(room) + LANES;
    }

    template <int W>
    void load_columns(const Group& group, Waves to) const {
        const T* x[W];
        for (int64_t k = 0; k < W; ++k)
            x[k] = k < group.count ? call.x.row(group.rows[k]) : nullptr;
        for_groups(call.in_size, LANES, [&](int64_t i, auto... n) {
            Floats rows[W];
#pragma GCC unroll 16
            for (int k = 0; k < W; ++k) rows[k] = x[k] ? load(x[k] + i, n...) : Floats{};
            Vector<W> columns[LANES];
            to_columns<W>(rows, columns);
            const Columns<W> out = input->columns<W>(to, i);
            for (int c = 0; c < min_of(LANES, n...); ++c) store_lanes(out.at(c), columns[c]);
        });
    }

    // y += w Re(ifft(...)), all that the transforms left out included
    template <int W>
    void add_columns(const Group& group, int64_t t, const Owners<T>& owners, Waves from) const {
        const RealTransform& output = *outputs[t];
        const float scale = static_cast<float>(0.5 / output.size / call.in_size /
                                               input->spectrum_scale());
        T* y[W];
        float factors[W];
        for (int64_t k = 0; k < W; ++k) {
            const bool adds = owners[k];
            y[k] = adds ? call.y.row(group.rows[k]) + call.targets.out_starts[t] : nullptr;
            factors[k] = adds ? owners[k]->weight * scale : 0.0f;
        }
        for_groups(output.size, LANES, [&](int64_t i, auto... n) {
            const Columns<W> in = output.columns<W>(from, i);
            Vector<W> columns[LANES] = {};
            for (int c = 0; c < min_of(LANES, n...); ++c) columns[c] = load_lanes<W>(in.at(c));
            Floats rows[W];
            to_rows<W>(columns, rows);
#pragma GCC unroll 16
            for (int k = 0; k < W; ++k)
                if (y[k]) store(y[k] + i, load(y[k] + i, n...) + factors[k] * rows[k], n...);
        });
    }

    const LinearCall<T>& call;
    std::shared_ptr<const RealTransform> input;
    std::vector<std::shared_ptr<const RealTransform>> outputs;
    std::vector<Part<T>> parts;
    std::vector<int32_t> found;  // (targets, rows): of parts
};

template <class T>
const char* add_spectral(const LinearCall<T>& call) {
    Spectral<T> spectral(call);
    if (const char* error = spectral.find()) return error;
    if (call.in_size == 0) return nullptr;
    const std::vector<Group> groups = spectral.groups();
    int64_t rows = 0;
    for (const Group& group : groups) rows = max_of(rows, group.count);
    return run_units(groups, spectral.scratch(rows), call.threads,
                     [&](const Group& group, float* own) { return spectral.compute(group, own); });
}

}  // namespace

EXPORT_CORRECTION(add_spectral_float32, float, add_spectral)
EXPORT_CORRECTION(add_spectral_bfloat16, bfloat16, add_spectral)
