// Sharing work between threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace adamax {

// Sets the floating-point state that every verb computes in, whoever calls it: rounding to
// nearest, subnormal numbers kept. XLA, for one, flushes them in its own threads.
class FloatingPointState {
  public:
    FloatingPointState();
    ~FloatingPointState();
    FloatingPointState(const FloatingPointState&) = delete;
    FloatingPointState& operator=(const FloatingPointState&) = delete;

  private:
    uint64_t saved_;
};

// To be called once, when the module is loaded: not in a first step, which another thread
// might fork in the midst of.
void make_pool();

using Body = void (*)(const void* context, int64_t piece);

// Calls `body(context, piece)` for each piece of [0, pieces), in up to `threads` threads,
// the caller's included. Returns when all have been done. Where another caller is at it
// already, or no thread can be started, the caller does more or all of the work by itself.
void run_in_parallel(int threads, int64_t pieces, Body body, const void* context);

// `function(piece)` must not throw.
template <class Function>
void parallel_for(int threads, int64_t pieces, const Function& function) {
    run_in_parallel(
        threads, pieces,
        [](const void* context, int64_t piece) {
            (*static_cast<const Function*>(context))(piece);
        },
        &function);
}

}  // namespace adamax
