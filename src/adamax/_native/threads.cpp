#include "threads.hpp"

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#include <signal.h>
#endif
#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace adamax {

#if defined(__SSE2__) || defined(_M_X64)
FloatingPointState::FloatingPointState() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
FloatingPointState::~FloatingPointState() { _mm_setcsr(uint32_t(saved_)); }
#elif defined(__aarch64__) && !defined(_MSC_VER)
FloatingPointState::FloatingPointState() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t(0)));
}
FloatingPointState::~FloatingPointState() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
FloatingPointState::FloatingPointState() : saved_(0) {}
FloatingPointState::~FloatingPointState() {}
#endif

namespace {

constexpr int kMostHelpers = 255;

struct Job {
    Body body;
    const void* context;
    int64_t pieces;
    alignas(128) std::atomic<int64_t> next{0};

    void work() {
        for (int64_t piece; (piece = next.fetch_add(1)) < pieces;) body(context, piece);
    }
};

// Threads that sleep until there is a job. One caller at a time has them.
class Pool {
  public:
    std::mutex callers;  // held by the caller that has the helpers, and during a fork

    void run(Job& job, int helpers) {
        start(helpers);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            wanted_ = helpers < count_ ? helpers : count_;
            for (int i = 0; i < wanted_; ++i) wake_.notify_one();
        }
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;  // whoever comes late finds nothing to do
        done_.wait(lock, [this] { return working_ == 0; });
        job_ = nullptr;
    }

  private:
    void start(int helpers) {
        if (helpers > kMostHelpers) helpers = kMostHelpers;
        if (count_ >= helpers) return;
#ifndef _WIN32
        // Signals are for the threads of the program.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
        try {
            for (; count_ < helpers; ++count_) std::thread([this] { help(); }).detach();
        } catch (const std::system_error&) {  // there can be no more threads
        }
#ifndef _WIN32
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
    }

    [[noreturn]] void help() {
        const FloatingPointState state;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            ++working_;
            Job& job = *job_;
            lock.unlock();
            job.work();
            lock.lock();
            if (--working_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int count_ = 0;    // helpers there are
    int wanted_ = 0;   // how many may still join the job
    int working_ = 0;  // how many have joined and not left
};

// Never destroyed: helpers may be asleep in it when the process ends.
Pool* pool = nullptr;

#ifndef _WIN32
// A forked child has the pool's memory but none of its threads, and gets a new pool. No
// fork happens while a caller has the helpers.
void before_fork() { pool->callers.lock(); }
void in_parent() { pool->callers.unlock(); }
void in_child() { pool = new Pool; }
#endif

}  // namespace

void make_pool() {
    if (pool != nullptr) return;
    pool = new Pool;
#ifndef _WIN32
    pthread_atfork(before_fork, in_parent, in_child);
#endif
}

void run_in_parallel(int threads, int64_t pieces, Body body, const void* context) {
    const int64_t useful = pieces < threads ? pieces : threads;
    Job job{body, context, pieces};
    if (useful > 1) {
        Pool& helpers = *pool;
        if (helpers.callers.try_lock()) {
            const std::lock_guard<std::mutex> lock(helpers.callers, std::adopt_lock);
            helpers.run(job, int(useful) - 1);
            return;
        }
    }
    job.work();
}

}  // namespace adamax
