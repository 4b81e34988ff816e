// Recorded calls, made one after the other by a team of threads.
#include "program.h"

#include <chrono>

#include "parallel.h"

namespace {

// Mirrored in program.py.
struct Call {
    PackedFunction function;
    const Value* values;
    Reads reads;  // no bytes where it reads nothing worth mentioning
};

using Clock = std::chrono::steady_clock;

class Steps {
  public:
    const char* error = nullptr;

    Steps(const Call* calls, int64_t count, double* seconds, int64_t threads)
        : calls(calls), count(count), seconds(seconds), team(threads) {}

    // A thread's part: the first makes the calls.
    void run() {
        const int64_t member = omp_get_thread_num();
        if (member) return team.serve(member);
        Team::own = &team;
        make_all();
        Team::own = nullptr;
        team.dismiss();
    }

  private:
    const Call* calls;
    int64_t count;
    double* seconds;
    Team team;

    void make_all() {
        int64_t reader = 0;  // the next call after this one that reads something
        for (int64_t i = 0; i < count && !error; ++i) {
            if (reader <= i) reader = announce(i + 1);
            const Clock::time_point start = seconds ? Clock::now() : Clock::time_point();
            error = calls[i].function(calls[i].values);
            if (seconds) seconds[i] = std::chrono::duration<double>(Clock::now() - start).count();
        }
    }

    int64_t announce(int64_t i) {
        while (i < count && !calls[i].reads.bytes) ++i;
        if (i < count) team.read_ahead(calls[i].reads);
        return i;
    }
};

}  // namespace

// Stops at the first call that finds something wrong, and returns that. Where `seconds` is given, each
// call's time is written there.
extern "C" const char* run_calls(const Call* calls, int64_t count, double* seconds, int64_t threads) {
    Steps steps(calls, count, seconds, threads);
    GOMP_parallel([](void* data) { static_cast<Steps*>(data)->run(); }, &steps,
                  static_cast<unsigned>(threads), 0);
    return steps.error;
}
