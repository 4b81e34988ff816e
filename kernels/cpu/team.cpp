// How threads of a recorded step wait for one another.
#include "team.h"

#include <sched.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Times that a member looks for work before it lets others have its core: about 50 us.
constexpr int64_t PATIENCE = 1000;

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// How far a member has asked for its share of what is read next.
class ReadAhead {
  public:
    // Asks for some lines more; returns whether there were any.
    bool fetch(const Reads* coming, int64_t member, int64_t members) {
        if (coming != reads) begin(coming, member, members);
        if (at >= end) return false;
        for (int64_t i = 0; i < LINES && at < end; ++i, at += LINE) __builtin_prefetch(at, 0, 2);
        return true;
    }

  private:
    // Lines asked for between two looks for work, and bytes asked for in all: of a cache's second level
    // of 1 or 2 MiB, in which the step has other numbers too.
    static constexpr int64_t LINE = 64, LINES = 4, MOST = 1 << 17;
    const Reads* reads = nullptr;
    const char *at = nullptr, *end = nullptr;

    void begin(const Reads* coming, int64_t member, int64_t members) {
        const int64_t first = coming->bytes * member / members;
        const int64_t last = coming->bytes * (member + 1) / members;
        reads = coming;
        at = coming->begin + first;
        end = coming->begin + (last - first < MOST ? last : first + MOST);
    }
};

}  // namespace

thread_local Team* Team::own = nullptr;

Team::Team(int64_t members)
    : members(members), posts(new Post[members > 1 ? members - 1 : 0]) {}

void Team::run(int64_t threads, Body body, void* data) {
    const int64_t others = (threads < members ? threads : members) - 1;
    ++turn;
    for (int64_t i = 0; i < others; ++i) posts[i].offer(turn, body, data);
    body(data);
    for (int64_t i = 0; i < others; ++i) posts[i].withdraw(turn);
}

void Team::serve(int64_t member) {
    Post& post = posts[member - 1];
    ReadAhead ahead;
    for (int64_t waited = 0; !over.load(std::memory_order_relaxed); ++waited) {
        const Reads* next = coming.load(std::memory_order_acquire);
        if (post.take()) waited = 0;
        else if (next && ahead.fetch(next, member, members)) waited = 0;
        else if (waited < PATIENCE) pause();
        else sched_yield();
    }
}

void Team::Post::offer(uint64_t turn, Body what, void* with) {
    body = what;
    data = with;
    state.store(turn * STATES + OFFERED, std::memory_order_release);
}

void Team::Post::withdraw(uint64_t turn) {
    uint64_t offered = turn * STATES + OFFERED;
    if (state.compare_exchange_strong(offered, turn * STATES + WITHDRAWN, std::memory_order_relaxed))
        return;
    while (state.load(std::memory_order_acquire) != turn * STATES + DONE) pause();
}

bool Team::Post::take() {
    uint64_t now = state.load(std::memory_order_relaxed);
    if (now % STATES != OFFERED) return false;
    if (!state.compare_exchange_strong(now, now - OFFERED + TAKEN, std::memory_order_acquire))
        return false;
    body(data);
    state.store(now - OFFERED + DONE, std::memory_order_release);
    return true;
}
