// replace_rows and correct_embedding on the CPU. Tokens are checked before anything is written.
#include <algorithm>

#include "../cpu/expand.h"
#include "../cpu/program.h"
#include "../cpu/tables.h"

namespace {

constexpr int64_t SERIAL_PRODUCTS = 1 << 16;  // below this, waking threads costs more than it saves
constexpr int64_t BLOCK_ROWS = 32;

enum RowsField { COUNT, ROWS_OF, IDS };
enum AffineField { RANK, TOKENS, A, B, SCALE };

template <class T>
struct Embedded {
    Matrix<T> x;
    const int64_t* tokens;
    int64_t rows, hidden;

    // Raises an error of the cell unless every token of these rows is in 0 .. count - 1.
    void require_tokens(Cell<T>& cell, int64_t start, int64_t end, int64_t count) const {
        const auto range = std::minmax_element(tokens + start, tokens + end);
        cell.require(*range.first >= 0 && *range.second < count,
                     "a token lies outside the embedding");
    }
};

// The place of a token among the ids that are replaced, or -1. Without ids, tokens are their places.
INLINE int64_t place_of(int64_t token, const int32_t* ids, int64_t count) {
    if (!ids) return token;
    const int32_t* found = std::lower_bound(ids, ids + count, token);
    return found != ids + count && *found == token ? found - ids : -1;
}

template <class T>
const char* replace_rows(const Embedded<T>& embedded, const Table& table, int64_t place,
                         const Segments& segments) {
    struct Replaced {
        const T* rows;
        const int32_t* ids;
        int64_t count, start, end;
    };
    std::vector<Replaced> found;
    const auto add = [&](Cell<T>& cell, int64_t start, int64_t end, float) {
        const int64_t count = cell[COUNT];
        const int32_t* ids = cell.optional_indices(IDS, count);
        found.push_back({cell.numbers(ROWS_OF, count, embedded.hidden), ids, count, start, end});
        if (!ids && !cell.error) embedded.require_tokens(cell, start, end, count);
    };
    if (const char* error = for_each_cell<T>(table, place, segments, embedded.rows, add))
        return error;
    for (const Replaced& each : found)
        for (int64_t row = each.start; row < each.end; ++row) {
            const int64_t at = place_of(embedded.tokens[row], each.ids, each.count);
            if (at < 0) continue;
            std::memcpy(embedded.x.row(row), each.rows + at * embedded.hidden,
                        embedded.hidden * sizeof(T));
        }
    return nullptr;
}

template <class T>
struct Unit {
    const T* a;
    Expansion<T> b;
    int64_t start, rows;
    float weight;
};

template <class T>
void correct(const Embedded<T>& embedded, const Unit<T>& unit, float* own) {
    const int64_t rank = unit.b.count;
    const Matrix<float> h{own, rank};  // w A[token]
    for (int64_t row = 0; row < unit.rows; ++row) {
        const T* a = unit.a + embedded.tokens[unit.start + row] * rank;
        for_groups(rank, LANES, [&](int64_t i, auto... n) {
            store(h.row(row) + i, load(a + i, n...) * unit.weight, n...);
        });
    }
    expand(unit.b, h, embedded.x.from(unit.start), unit.rows, unit.weight);
}

template <class T>
const char* correct_embedding(const Embedded<T>& embedded, const Table& table, int64_t place,
                              const Segments& segments, int64_t threads) {
    std::vector<Unit<T>> units;
    int64_t scratch = 0, products = 0;
    const auto add = [&](Cell<T>& cell, int64_t start, int64_t end, float weight) {
        const int64_t rank = cell[RANK], hidden = embedded.hidden;
        const T *a = nullptr, *b = nullptr;
        if (rank) {
            a = cell.numbers(A, cell[TOKENS], rank);
            b = cell.numbers(B, rank, hidden);
            if (!cell.error) embedded.require_tokens(cell, start, end, cell[TOKENS]);
        }
        const T* scale = cell.optional_numbers(SCALE, hidden);
        if (cell.error) return;
        scratch = max_of(scratch, min_of(BLOCK_ROWS, end - start) * rank);
        products += (end - start) * (rank + 1) * hidden;
        for (int64_t row = start; row < end; row += BLOCK_ROWS)
            units.push_back({a, {b, rank, hidden, nullptr, scale}, row,
                             min_of(BLOCK_ROWS, end - row), weight});
    };
    if (const char* error = for_each_cell<T>(table, place, segments, embedded.rows, add))
        return error;
    return run_units(units, scratch, products < SERIAL_PRODUCTS ? 1 : threads,
                     [&](const Unit<T>& unit, float* own) {
                         correct(embedded, unit, own);
                         return static_cast<const char*>(nullptr);
                     });
}

}  // namespace

#define EXPORT(DTYPE, T)                                                                           \
    extern "C" const char* replace_rows_##DTYPE(void* x, const int64_t* tokens, int64_t rows,      \
                                                int64_t hidden, const Table* table, int64_t place, \
                                                const Segments* segments, int64_t) {               \
        return replace_rows<T>({{static_cast<T*>(x), hidden}, tokens, rows, hidden}, *table, place, \
                               *segments);                                                         \
    }                                                                                              \
    extern "C" const char* correct_embedding_##DTYPE(                                              \
        void* x, const int64_t* tokens, int64_t rows, int64_t hidden, const Table* table,          \
        int64_t place, const Segments* segments, int64_t threads) {                                \
        return correct_embedding<T>({{static_cast<T*>(x), hidden}, tokens, rows, hidden}, *table,  \
                                    place, *segments, threads);                                    \
    }                                                                                               \
    EXPORT_PACKED(replace_rows_##DTYPE)                                                             \
    EXPORT_PACKED(correct_embedding_##DTYPE)

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
