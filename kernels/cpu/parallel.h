// Threads from the OpenMP runtime that torch has loaded: a pool of our own would fight with torch's
// for the cores. GOMP_parallel is what `#pragma omp parallel` compiles to; calling it directly lets
// any compiler share that very runtime, where the pragma would tie Clang to a second one.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "team.h"

extern "C" int omp_get_thread_num();
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Runs worker() on up to `threads` threads, once on each, and waits for those that have begun.
template <class Worker>
void run_parallel(int64_t threads, Worker worker) {
    if (threads <= 1) return worker();
    const Team::Body body = [](void* data) { (*static_cast<Worker*>(data))(); };
    if (Team::own) Team::own->run(threads, body, &worker);
    else GOMP_parallel(body, &worker, static_cast<unsigned>(threads), 0);
}

// Tasks that threads share. Each begins with a range of its own, the same in every call of that many
// tasks, because what it wrote last lies in its own cache; whoever is done first helps the others.
class Tasks {
  public:
    Tasks(int64_t tasks, int64_t threads) : ranges(new Range[threads > 1 ? threads : 1]) {
        count = threads > 1 ? threads : 1;
        for (int64_t i = 0; i < count; ++i) {
            ranges[i].next.store(tasks * i / count, std::memory_order_relaxed);
            ranges[i].end = tasks * (i + 1) / count;
        }
    }

    // Calls body(task) for the running thread's tasks, until none is left of any.
    template <class Body>
    void each(Body body) {
        const int64_t own = omp_get_thread_num();
        for (int64_t i = 0; i < count; ++i) {
            Range& range = ranges[(own + i) % count];
            for (int64_t task; (task = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
                body(task);
        }
    }

  private:
    struct alignas(64) Range {
        std::atomic<int64_t> next;
        int64_t end;
    };
    std::unique_ptr<Range[]> ranges;
    int64_t count;
};

// Runs worker(shared) once on each thread, for it to take its share of the tasks; on one, if there is
// only one task.
template <class Worker>
void share_tasks(int64_t tasks, int64_t threads, Worker worker) {
    const int64_t usable = tasks > 1 ? threads : 1;
    Tasks shared(tasks, usable);
    run_parallel(usable, [&] { worker(shared); });
}

// Calls body(task) for every task below `tasks`.
template <class Body>
void for_each_task(int64_t tasks, int64_t threads, Body body) {
    share_tasks(tasks, threads, [&](Tasks& shared) { shared.each(body); });
}
