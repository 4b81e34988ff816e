// Products of adapters' matrices S with the spectra of rows that stand side by side.
#pragma once

#include <algorithm>

#include "../cpu/products.h"
#include "fourier.h"
#include "places.h"

// What an adapter adds to one target.
template <class T>
struct Part {
    Entries<T> entries;
    float weight;
};

// What the adapters of rows side by side add to one target; null where one adds nothing.
template <class T>
using Owners = const Part<T>* [LANES];

template <class T>
static const Part<T>* first_of(const Owners<T>& owners) {
    const Part<T>* const* found = owners;
    while (!*found) ++found;
    return *found;
}

// Lanes of a bin that are computed at once: both its parts where a vector holds them.
template <int W>
constexpr int HELD = 2 * W <= LANES ? 2 * W : W;

// value(e) is what entry e is, for all rows or for each of them
template <int W, class Value>
INLINE void add_entries(const Places& places, int64_t begin, int64_t end, Bins<W> x, Bins<W> sums,
                        Value value) {
#pragma GCC unroll 16
    for (int64_t e = begin; e < end; ++e) {
        const float *in = x.data + places.inputs[e], *signs = SIGNS<W>.of + places.signs[e];
        float* sum = sums.data + places.outputs[e];
        const auto factor = value(e);
#pragma GCC unroll 2
        for (int i = 0; i < 2 * W; i += HELD<W>) {
            const auto signed_factor = factor * load_lanes<HELD<W>>(signs + i);
            store_lanes(sum + i, signed_factor * load_lanes<HELD<W>>(in + i) +
                                     load_lanes<HELD<W>>(sum + i));
        }
    }
}

// sums (bins, W) += S x of adapters whose entries stand at the same places
template <class T, int W>
static void multiply_columns(const Owners<T>& owners, int64_t rows, Places& places, Bins<W> x,
                             Bins<W> sums) {
    const Part<T>* first = first_of(owners);
    const bool one = std::all_of(owners, owners + rows, [&](auto* own) { return own == first; });
    const T* values[W];
    for (int64_t k = 0; k < W; ++k) values[k] = owners[k] ? owners[k]->entries.values : nullptr;
    places.each<W>(first->entries, [&] {
        if (one) {
            const T* all = first->entries.values + places.first;
            return add_entries(places, 0, places.count, x, sums,
                               [&](int64_t e) { return to_float(all[e]); });
        }
        for_groups(places.count, LANES, [&](int64_t i, auto... n) {
            Floats tile[W];
#pragma GCC unroll 16
            for (int k = 0; k < W; ++k)
                tile[k] = values[k] ? load(values[k] + places.first + i, n...) : Floats{};
            Vector<HELD<W>> factors[LANES];
            if constexpr (HELD<W> == W) to_columns<W>(tile, factors);
            else to_column_pairs<W>(tile, factors);
            add_entries(places, i, i + min_of(LANES, n...), x, sums,
                        [&](int64_t e) { return factors[e - i]; });
        });
    });
}

template <class T, int W>
static void add_row(const Places& places, const T* values, const float* x, float* sums) {
    for (int64_t e = 0; e < places.count; ++e) {
        const float *in = x + places.inputs[e], *signs = SIGNS<W>.of + places.signs[e];
        float* sum = sums + places.outputs[e];
        const float value = to_float(values[e]);
        sum[0] = fused(value, in[0], sum[0]);
        sum[W] = fused(value * signs[W], in[W], sum[W]);
    }
}

// sums (bins, W) += S x, of each row's own S
template <class T, int W>
static void multiply_rows(const Owners<T>& owners, int64_t rows, Places& places, Bins<W> x,
                          Bins<W> sums) {
    for (int64_t k = 0, next; k < rows; k = next) {
        for (next = k + 1; next < rows && owners[next] == owners[k];) ++next;
        if (!owners[k]) continue;
        const Entries<T>& entries = owners[k]->entries;
        places.each<W>(entries, [&] {
            const T* values = entries.values + places.first;
            for (int64_t row = k; row < next; ++row)
                add_row<T, W>(places, values, x.data + row, sums.data + row);
        });
    }
}
