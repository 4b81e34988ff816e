// add_spectral on the CPU. A unit of work is up to LANES rows, of whatever adapters, side by side: they
// are transformed together, once for all targets of the site, then each is multiplied by its own S, and
// the products of a target are transformed back together. Rows are multiplied side by side as well where
// all matrices have their entries at the same places, as those of one adapter do, and those of most
// adapters of one rank and seed; others one by one, each laid out for itself. Every number of a product
// has one accumulator that takes its entries in order, in either case.
#include <algorithm>

#include "../cpu/products.h"
#include "../cpu/tables.h"
#include "../sparse/entries.h"
#include "fourier.h"

namespace {

// What an adapter adds to one target.
template <class T>
struct Part {
    Entries<T> entries;
    float weight;
};

// Rows that are transformed at once.
struct Group {
    int64_t count;
    int64_t rows[LANES];
};

// What their adapters add to one target; null where one adds nothing.
template <class T>
using Owners = const Part<T>* [LANES];

// Where some entries of S stand in half a spectrum: the bins of their rows and columns. Of a bin beyond
// the half there is the conjugate; `sign` is -1 where an entry meets one, of which the imaginary part is
// the other way round.
class Places {
  public:
    static constexpr int64_t MOST = 1 << 10;
    int64_t first, count;
    int32_t outputs[MOST + LANES], inputs[MOST];
    float sign[MOST];

    // Calls body() for all entries, some at a time.
    template <class T, class Body>
    void each(const Entries<T>& entries, Body body) {
        const int64_t end = entries.row_starts[entries.out_size];
        int64_t row = 0;
        for (first = entries.row_starts[0]; first < end; first += MOST) {
            count = min_of(MOST, end - first);
            row = find_rows(entries.row_starts, row);
            find_bins(entries.columns + first, static_cast<int32_t>(entries.in_size),
                      static_cast<int32_t>(entries.out_size));
            body();
        }
    }

  private:
    // Writes every entry's row into outputs, beginning with `row`; returns the one to begin with behind
    // these. Most rows are shorter than a vector, so that a row is one store, whose end the next ones
    // overwrite.
    int64_t find_rows(const int32_t* starts, int64_t row) {
        const int64_t end = first + count;
        while (true) {
            const Ints number = static_cast<int32_t>(row) - Ints{};
            int64_t at = max_of(starts[row], first);
            do {
                std::memcpy(outputs + (at - first), &number, sizeof number);
                at += LANES;
            } while (at < min_of(starts[row + 1], end));
            if (starts[row + 1] >= end) return row;
            ++row;
        }
    }

    void find_bins(const int32_t* columns, int32_t in_size, int32_t out_size) {
        for (int64_t i = 0; i < count; ++i) {
            const int32_t o = outputs[i], mirrored_o = out_size - o;
            const int32_t c = columns[i], mirrored_c = in_size - c;
            outputs[i] = o > mirrored_o ? mirrored_o : o;
            inputs[i] = c > mirrored_c ? mirrored_c : c;
            sign[i] = (o > mirrored_o) != (c > mirrored_c) ? -1.0f : 1.0f;
        }
    }
};

template <class T>
class Spectral {
  public:
    explicit Spectral(const LinearCall<T>& call)
        : call(call), input(real_transform(call.in_size)),
          found(call.targets.count * call.rows, NONE) {}

    // Finds what is to be done; returns what is wrong with it, or null.
    const char* find() {
        for (int64_t t = 0; t < call.targets.count; ++t) {
            const int64_t width = call.targets.out_sizes[t];
            if (!inside(call.targets.out_starts[t], width, call.out_size))
                return "a target reaches outside the output's columns";
            outputs.push_back(real_transform(width));
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

    int64_t scratch() const { return 8 * plane(); }

    // Corrects the rows of one group; returns what is wrong in index tensors, or null.
    const char* compute(const Group& group, float* scratch) const {
        const int64_t rows = group.count;
        const auto buffer = [&](int64_t i) {
            return Waves{scratch + 2 * i * plane(), scratch + (2 * i + 1) * plane()};
        };
        Waves x = buffer(0), sums = buffer(1), other = buffer(2);
        load_columns(group, x);
        input->to_spectrum(x, other, rows);
        const Waves x_rows = rows == 1 ? x : buffer(3);
        bool has_rows = rows == 1;
        for (int64_t t = 0; t < call.targets.count; ++t) {
            Owners<T> owners;
            if (!find_owners(group, t, owners)) continue;
            if (const char* error = check(owners, rows)) return error;
            // a row or two are too few to be multiplied side by side
            if (rows > 2 && same_places(owners, rows)) {
                multiply_columns(owners, rows, *outputs[t], x, sums);
            } else {
                if (!has_rows) to_rows(*input, rows, x, x_rows);
                has_rows = true;
                multiply_rows(owners, rows, *outputs[t], x_rows, sums);
                if (rows > 1) to_columns(*outputs[t], rows, sums, other);
            }
            outputs[t]->to_numbers(sums, other, rows);
            add_columns(group, t, owners, sums);
        }
        return nullptr;
    }

  private:
    static constexpr int32_t NONE = -1;

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
        for (int64_t k = 0; k < group.count; ++k) {
            owners[k] = part(t, group.rows[k]);
            any = any || owners[k];
        }
        return any;
    }

    static const char* check(const Owners<T>& owners, int64_t rows) {
        const Part<T>* last = nullptr;
        for (int64_t k = 0; k < rows; ++k) {
            if (!owners[k] || owners[k] == last) continue;
            last = owners[k];
            if (const char* error = last->entries.check(0, last->entries.out_size)) return error;
        }
        return nullptr;
    }

    static const Part<T>* first_of(const Owners<T>& owners) {
        const Part<T>* const* found = owners;
        while (!*found) ++found;
        return *found;
    }

    static bool same_places(const Owners<T>& owners, int64_t rows) {
        const Part<T>* first = first_of(owners);
        for (int64_t k = 0; k < rows; ++k)
            if (owners[k] && owners[k] != first && !first->entries.same_places(owners[k]->entries))
                return false;
        return true;
    }

    // Floats of half a buffer, for LANES rows; a vector is read and written at the end of each.
    int64_t plane() const {
        int64_t room = input->room();
        for (const auto& output : outputs) room = max_of(room, output->room());
        return LANES * padded(room) + LANES;
    }

    void load_columns(const Group& group, Waves to) const {
        for_groups(call.in_size, LANES, [&](int64_t i, auto... n) {
            Floats tile[LANES] = {};
            for (int64_t k = 0; k < group.count; ++k)
                tile[k] = load(call.x.row(group.rows[k]) + i, n...);
            transpose(tile);
            for (int64_t k = 0; k < min_of(LANES, call.in_size - i); ++k)
                store(input->column(to, i + k, group.count), tile[k]);
        });
    }

    // y += w Re(ifft(...)), all that the transforms left out included
    void add_columns(const Group& group, int64_t t, const Owners<T>& owners, Waves from) const {
        const RealTransform& output = *outputs[t];
        const float scale = static_cast<float>(0.5 / output.size / call.in_size /
                                               input->spectrum_scale());
        for_groups(output.size, LANES, [&](int64_t i, auto... n) {
            Floats tile[LANES] = {};
            for (int64_t k = 0; k < min_of(LANES, output.size - i); ++k)
                tile[k] = load(output.column(from, i + k, group.count));
            transpose(tile);
            for (int64_t k = 0; k < group.count; ++k) {
                if (!owners[k]) continue;
                T* y = call.y.row(group.rows[k]) + call.targets.out_starts[t] + i;
                store(y, load(y, n...) + owners[k]->weight * scale * tile[k], n...);
            }
        });
    }

    // From (bins, rows) to (rows, padded bins), and back.
    static void to_rows(const RealTransform& of, int64_t rows, Waves from, Waves to) {
        const int64_t stride = padded(of.bins());
        transpose<float>({from.re, rows}, of.bins(), rows, {to.re, stride});
        transpose<float>({from.im, rows}, of.bins(), rows, {to.im, stride});
    }

    static void to_columns(const RealTransform& of, int64_t rows, Waves& now, Waves& other) {
        const int64_t stride = padded(of.bins());
        transpose<float>({now.re, stride}, rows, of.bins(), {other.re, rows});
        transpose<float>({now.im, stride}, rows, of.bins(), {other.im, rows});
        std::swap(now, other);
    }

    // sums (bins, rows) = S x of adapters whose entries stand at the same places
    static void multiply_columns(const Owners<T>& owners, int64_t rows, const RealTransform& output,
                                 Waves x, Waves sums) {
        const Part<T>* first = first_of(owners);
        const bool alike = std::all_of(owners, owners + rows, [&](auto* own) { return own == first; });
        clear(sums, output.bins() * rows);
        Places places;
        places.each(first->entries, [&] {
            const T* values = first->entries.values + places.first;
            if (alike)
                add_entries(places, 0, places.count, rows, x, sums,
                            [&](int64_t e) { return splat(to_float(values[e])); });
            else
                for_groups(places.count, LANES, [&](int64_t i, auto... n) {
                    Floats tile[LANES] = {};
                    for (int64_t k = 0; k < rows; ++k)
                        if (owners[k])
                            tile[k] = load(owners[k]->entries.values + places.first + i, n...);
                    transpose(tile);
                    add_entries(places, i, min_of(i + LANES, places.count), rows, x, sums,
                                [&](int64_t e) { return tile[e - i]; });
                });
        });
    }

    // value(e) is what entry e is for each of the rows
    template <class Value>
    INLINE_MEMBER static void add_entries(const Places& places, int64_t begin, int64_t end,
                                          int64_t rows, Waves x, Waves sums, Value value) {
        for_groups(rows, LANES, [&](int64_t, auto... n) {
            for (int64_t e = begin; e < end; ++e) {
                const int64_t o = places.outputs[e] * rows;
                const Complex in = x.at(places.inputs[e] * rows, n...), sum = sums.at(o, n...);
                const Floats factor = value(e), signed_im = places.sign[e] * in.im;
                sums.put(o, Complex{factor * in.re + sum.re, factor * signed_im + sum.im}, n...);
            }
        });
    }

    // sums (rows, padded bins) = S x, of each row's own S
    static void multiply_rows(const Owners<T>& owners, int64_t rows, const RealTransform& output,
                              Waves x, Waves sums) {
        const int64_t out_stride = padded(output.bins());
        clear(sums, rows * out_stride);
        Places places;
        for (int64_t k = 0, next; k < rows; k = next) {
            for (next = k + 1; next < rows && owners[next] == owners[k];) ++next;
            if (!owners[k]) continue;
            const Entries<T>& entries = owners[k]->entries;
            const int64_t stride = padded(entries.in_size / 2 + 1);
            places.each(entries, [&] {
                for (int64_t row = k; row < next; ++row)
                    add_entries(places, entries.values + places.first, x.from(row * stride),
                                sums.from(row * out_stride));
            });
        }
    }

    static void add_entries(const Places& places, const T* values, Waves x, Waves sums) {
        for (int64_t e = 0; e < places.count; ++e) {
            const int64_t o = places.outputs[e], c = places.inputs[e];
            const float value = to_float(values[e]), signed_im = places.sign[e] * x.im[c];
            sums.re[o] = fused(value, x.re[c], sums.re[o]);
            sums.im[o] = fused(value, signed_im, sums.im[o]);
        }
    }

    static void clear(Waves waves, int64_t size) {
        for_groups(size, LANES, [&](int64_t i, auto...) { waves.put(i, Complex{}); });
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
    return run_units(spectral.groups(), spectral.scratch(), call.threads,
                     [&](const Group& group, float* own) { return spectral.compute(group, own); });
}

}  // namespace

EXPORT_CORRECTION(add_spectral_float32, float, add_spectral)
EXPORT_CORRECTION(add_spectral_bfloat16, bfloat16, add_spectral)
