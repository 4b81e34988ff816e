// Recorded calls, made one after the other.
#include "program.h"

#include <chrono>

// Mirrored in program.py.
struct Call {
    PackedFunction function;
    const Value* values;
};

// Stops at the first call that finds something wrong, and returns that. Where `seconds` is given, each
// call's time is written there.
extern "C" const char* run_calls(const Call* calls, int64_t count, double* seconds) {
    using Clock = std::chrono::steady_clock;
    for (int64_t i = 0; i < count; ++i) {
        const Clock::time_point start = seconds ? Clock::now() : Clock::time_point();
        if (const char* error = calls[i].function(calls[i].values)) return error;
        if (seconds) seconds[i] = std::chrono::duration<double>(Clock::now() - start).count();
    }
    return nullptr;
}
