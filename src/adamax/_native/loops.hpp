// The loops over elements, as tables of functions: one table for each instruction set.
#pragma once

#include "storage.hpp"

namespace adamax {

// What the rule takes besides memory, in the order of Scalar in _core/kernels.py.
template <class T>
struct Scalars {
    T step_size;      // lr_t / (1 - beta_1**t)
    T decay;          // what w is multiplied by
    T scale;          // what g is multiplied by, before it is clamped
    T coupled_decay;  // what part of w is then added to g (L2 regularisation)
    T one_minus_beta_1;
    T beta_2;
    T epsilon;
    T clipvalue;  // what g is clamped to
};

// What a stale row must be told of the steps it has not taken.
template <class T>
struct Gap {
    T of_w, of_m, of_u;  // what each is multiplied by
    T epsilon;
    const T* sums;  // of the Chebyshev series
    int64_t terms;  // 1 and some fours
};

// `w`, `m`, `u` and `g` do not overlap. Nothing is allocated or thrown.
template <class T>
struct LoopsOf {
    void (*update)(T* w, T* m, T* u, const T* g, int64_t length, const Scalars<T>&);
    void (*catch_up)(T* w, T* m, T* u, int64_t length, const Gap<T>&);
    double (*square_sum)(const double* g, int64_t length);
    double (*square_sum_of)(const T* g, int64_t length);
    void (*add)(double* sums, const T* g, int64_t length);
};

struct Loops {
    const char* name;
    LoopsOf<float> on_float;
    LoopsOf<double> on_double;
    void (*widen_float16)(const uint16_t*, float*, int64_t length);
    void (*widen_bfloat16)(const uint16_t*, float*, int64_t length);
    void (*narrow_float16)(const float*, uint16_t*, int64_t length);
    void (*narrow_bfloat16)(const float*, uint16_t*, int64_t length);
    // By random bits; the first element has this number.
    void (*round_bfloat16)(
        const float*, uint16_t*, int64_t length, RandomKey, uint32_t number);
    // m and u in eight bits each. `factor` is that of the frame.
    void (*decode)(const int8_t* m_codes, const uint8_t* u_codes, float* m, float* u,
        int64_t length, double factor);
    void (*encode)(const float* m, const float* u, int8_t* m_codes, uint8_t* u_codes,
        int64_t length, double factor, RandomKey, uint32_t number);

    const LoopsOf<float>& of(float) const { return on_float; }
    const LoopsOf<double>& of(double) const { return on_double; }
};

namespace base {
extern const Loops kLoops;
}
#ifdef ADAMAX_X86_64
namespace avx2 {
extern const Loops kLoops;
}
namespace avx512 {
extern const Loops kLoops;
}
#endif

// The loops for this processor, or those that the environment variable ADAMAX_ISA names.
// Null where it names none that this processor has.
const Loops* choose_loops(const char* name);
const Loops& loops();
void use_loops(const Loops&);

}  // namespace adamax
