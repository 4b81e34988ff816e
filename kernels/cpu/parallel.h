// Threads from the OpenMP runtime that torch has loaded: a pool of our own would fight with torch's
// for the cores. GOMP_parallel is what `#pragma omp parallel` compiles to; calling it directly lets
// any compiler share that very runtime, where the pragma would tie Clang to a second one.
#pragma once

#include <atomic>
#include <cstdint>

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Runs worker() once on each of `threads` threads and waits for all.
template <class Worker>
void run_parallel(int64_t threads, Worker worker) {
    if (threads <= 1) return worker();
    GOMP_parallel([](void* data) { (*static_cast<Worker*>(data))(); }, &worker,
                  static_cast<unsigned>(threads), 0);
}

// Calls body(task) for every task below `tasks`, each thread taking the next one as it gets free.
template <class Body>
void for_each_task(int64_t tasks, int64_t threads, Body body) {
    std::atomic<int64_t> next{0};
    run_parallel(tasks > 1 ? threads : 1, [&] {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
    });
}
