// The choice of the loops for this processor.

#include <cstdlib>
#include <cstring>

#include "loops.hpp"

#if defined(ADAMAX_X86_64) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace adamax {
namespace {

#ifdef ADAMAX_X86_64
#ifdef _MSC_VER
// The operating system must save the registers, which CPUID alone does not tell.
bool has(int leaf, int reg, int bit, uint64_t saved) {
    int info[4];
    __cpuid(info, 1);
    const bool xsave = info[2] & (1 << 27);
    if (!xsave || (_xgetbv(0) & saved) != saved) return false;
    __cpuidex(info, leaf, 0);
    return info[reg] & (1 << bit);
}
bool has_avx2() { return has(7, 1, 5, 0x6); }
bool has_avx512() {
    return has(7, 1, 16, 0xE6) && has(7, 1, 17, 0xE6) && has(7, 1, 30, 0xE6) &&
           has(7, 1, 31, 0xE6);
}
#else
bool has_avx2() { return __builtin_cpu_supports("avx2"); }
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#endif

const Loops* current = &base::kLoops;

}  // namespace

const Loops* choose_loops(const char* name) {
    const bool any = name == nullptr || *name == 0;
#ifdef ADAMAX_X86_64
    if ((any || !std::strcmp(name, "avx512")) && has_avx512()) return &avx512::kLoops;
    if ((any || !std::strcmp(name, "avx2")) && has_avx2()) return &avx2::kLoops;
#endif
    if (any || !std::strcmp(name, "base")) return &base::kLoops;
    return nullptr;
}

const Loops& loops() { return *current; }

void use_loops(const Loops& chosen) { current = &chosen; }

}  // namespace adamax
