// Where some entries of S stand in half a spectrum: the bins of their rows and columns, in floats
// from the beginning of Bins<W>. Of a bin beyond the half there is the conjugate; where an entry
// meets one, the imaginary part is the other way round: a bin is multiplied by SIGNS<W> from `signs`
// on.
#pragma once

#include "../sparse/entries.h"
#include "lanes.h"

template <int W>
struct Signs {
    alignas(64) float of[4 * W];
    constexpr Signs() : of() {
        for (int i = 0; i < 4 * W; ++i) of[i] = i < 3 * W ? 1.0f : -1.0f;
    }
};
template <int W>
constexpr Signs<W> SIGNS;

class Places {
  public:
    static constexpr int64_t MOST = 1 << 10;
    int64_t first, count;
    int32_t outputs[MOST + LANES], inputs[MOST], signs[MOST];

    // Calls body() for all entries, some at a time. Places that are here since the last call, of as many
    // rows, are not looked up again: an adapter's matrices of one size may share them.
    template <int W, class T, class Body>
    void each(const Entries<T>& entries, Body body) {
        if (holds(entries)) return body();
        const int64_t end = entries.row_starts[entries.out_size];
        int64_t row = 0;
        for (first = entries.row_starts[0]; first < end; first += MOST) {
            count = min_of(MOST, end - first);
            row = find_rows(entries.row_starts, row);
            find_bins<W>(entries.columns + first, static_cast<int32_t>(entries.in_size),
                      static_cast<int32_t>(entries.out_size));
            body();
        }
        const bool all = end - entries.row_starts[0] <= MOST && end > entries.row_starts[0];
        if (all) first = entries.row_starts[0];
        starts = all ? entries.row_starts : nullptr;
        columns = entries.columns;
        in_size = entries.in_size;
        out_size = entries.out_size;
    }

  private:
    const int32_t *starts = nullptr, *columns = nullptr;
    int64_t in_size, out_size;

    template <class T>
    bool holds(const Entries<T>& entries) const {
        return starts == entries.row_starts && columns == entries.columns &&
               in_size == entries.in_size && out_size == entries.out_size;
    }

    // Writes every entry's row into outputs; `row` is that of the first one. Returns the row to begin
    // with behind these. Most rows are shorter than a vector, so that a row is one store, whose end
    // the next ones overwrite.
    int64_t find_rows(const int32_t* starts, int64_t row) {
        const int64_t end = first + count;
        constexpr int64_t STEP = 8;
        typedef int32_t Same __attribute__((vector_size(4 * STEP)));
        Same number = static_cast<int32_t>(row) - Same{};
        for (int64_t at = first;; ++row, number += 1) {
            const int64_t next = starts[row + 1];
            store_lanes(outputs + (at - first), number);
            if (next - at > STEP || next >= end) {
                for (at += STEP; at < min_of(next, end); at += STEP)
                    store_lanes(outputs + (at - first), number);
                if (next >= end) return row;
            }
            at = next;
        }
    }

    template <int W>
    void find_bins(const int32_t* columns, int32_t in_size, int32_t out_size) {
        for (int64_t i = 0; i < count; ++i) {
            const int32_t o = outputs[i], mirrored_o = out_size - o;
            const int32_t c = columns[i], mirrored_c = in_size - c;
            outputs[i] = (o > mirrored_o ? mirrored_o : o) * 2 * W;
            inputs[i] = (c > mirrored_c ? mirrored_c : c) * 2 * W;
            signs[i] = (o > mirrored_o) != (c > mirrored_c) ? 2 * W : 0;
        }
    }
};
