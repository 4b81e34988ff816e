// Threads that stay together for all the calls of a recorded step. Between two parallel parts they
// neither sleep nor go through the runtime. What the leader is about to do alone, it need not wait for
// anyone: a member that the system does not run just now comes too late, and the others do its work. And
// while a member has nothing to do, it reads ahead: memory is never idle because a core is.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

// Memory that will be read soon: by every member its share, in order.
struct Reads {
    const char* begin = nullptr;
    int64_t bytes = 0;
};

class Team {
  public:
    using Body = void (*)(void*);

    // The team that this thread leads; null where it leads none.
    static thread_local Team* own;

    explicit Team(int64_t members);

    // Calls body(data) on the leader, which is who calls this, and on those of threads - 1 members that
    // come while it runs there; returns when all that have begun are done.
    void run(int64_t threads, Body body, void* data);

    // What members read while they wait; it must stay where it is.
    void read_ahead(const Reads& reads) { coming.store(&reads, std::memory_order_release); }

    // The part of members 1, 2 ... in what the leader runs, until it dismisses them.
    void serve(int64_t member);

    void dismiss() { over.store(true, std::memory_order_relaxed); }

  private:
    // What is offered to one member. Its state says which turn's work that is, and how far it is.
    class alignas(64) Post {
      public:
        void offer(uint64_t turn, Body what, void* with);
        void withdraw(uint64_t turn);
        bool take();

      private:
        enum : uint64_t { WITHDRAWN, OFFERED, TAKEN, DONE, STATES };
        std::atomic<uint64_t> state{WITHDRAWN};
        Body body = nullptr;
        void* data = nullptr;
    };

    const int64_t members;
    const std::unique_ptr<Post[]> posts;
    uint64_t turn = 0;
    alignas(64) std::atomic<const Reads*> coming{nullptr};
    std::atomic<bool> over{false};
};
