// gather_rows on the CPU: bytes, whatever they are of.
#include <cstring>

#include "../cpu/parallel.h"
#include "../cpu/program.h"

namespace {

constexpr int64_t SERIAL_BYTES = 1 << 16;  // below this, waking threads costs more than it saves
constexpr int64_t TASK_ROWS = 16;
constexpr int64_t LINE = 64;

// Rows lie anywhere, so that each would be waited for: a task asks for all of its own at once.
void prefetch_rows(const char* table, int64_t row_bytes, const int64_t* indices, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t at = 0; at < row_bytes; at += LINE)
            __builtin_prefetch(table + indices[i] * row_bytes + at);
}

}  // namespace

extern "C" const char* gather_rows(void* y, const void* table, int64_t entries, int64_t row_bytes,
                                   const int64_t* indices, int64_t rows, int64_t threads) {
    for (int64_t i = 0; i < rows; ++i)
        if (indices[i] < 0 || indices[i] >= entries) return "an index is none of the table's rows";
    const char* from = static_cast<const char*>(table);
    char* to = static_cast<char*>(y);
    const int64_t usable = rows * row_bytes < SERIAL_BYTES ? 1 : threads;
    for_each_task((rows + TASK_ROWS - 1) / TASK_ROWS, usable, [=](int64_t task) {
        const int64_t first = task * TASK_ROWS;
        const int64_t count = rows - first < TASK_ROWS ? rows - first : TASK_ROWS;
        prefetch_rows(from, row_bytes, indices + first, count);
        for (int64_t i = first; i < first + count; ++i)
            std::memcpy(to + i * row_bytes, from + indices[i] * row_bytes, row_bytes);
    });
    return nullptr;
}
EXPORT_PACKED(gather_rows)
