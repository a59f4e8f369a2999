// The threads of the native core without Python, for ThreadSanitizer: many callers, jobs of
// any size, forks in the midst. Prints "ok".

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "threads.hpp"

namespace {

void check(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::_Exit(1);
}

// Every piece is done once, and what it wrote is seen by the caller.
void run_once(int threads, int64_t pieces) {
    std::vector<int> done(size_t(pieces), 0);
    adamax::parallel_for(threads, pieces, [&](int64_t piece) { ++done[size_t(piece)]; });
    for (int count : done) check(count == 1, "a piece is done once");
}

void run_many(int seed) {
    for (int i = 0; i < 300; ++i) run_once(1 + (seed + i) % 5, (seed * 7 + i) % 40);
}

void run_in_a_fork() {
    const pid_t child = fork();
    check(child >= 0, "fork");
    if (child == 0) {
        run_many(3);
        std::_Exit(7);
    }
    int status = 0;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 7, "a forked child can go on");
}

}  // namespace

int main(int argc, char**) {
    adamax::make_pool();
    std::vector<std::thread> callers;
    for (int seed = 0; seed < 4; ++seed) callers.emplace_back(run_many, seed);
    // The locks of sanitizers do not survive a fork of a process with threads.
    if (argc == 1) {
        for (int i = 0; i < 20; ++i) run_in_a_fork();
    }
    for (std::thread& caller : callers) caller.join();
    run_many(1);
    std::puts("ok");
}
