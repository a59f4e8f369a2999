// The rule of Adamax on runs of elements, the one place of its formula in C++.
//
// Included by the files that are compiled once for each instruction set: everything lies in
// the namespace ADAMAX_ISA, so that the linker never takes one instruction set's copy of a
// function for another's. The operations and their order are those of _core/reference.py.

#include "loops.hpp"

namespace adamax::ADAMAX_ISA {

// `m / (u + epsilon)`, where `denominator` is the latter; 0 where that is 0, since only
// gradients of zero have been seen then. A NaN in `m` comes through.
template <class T>
inline T quotient(T m, T denominator) {
    return denominator == 0 ? 0 * m : m / denominator;
}

template <class T>
inline T magnitude(T number) {
    return number < 0 ? -number : number + 0;  // + 0 makes 0 of -0
}

// A NaN in either must come out: std::max and std::fmax lose it.
template <class T>
inline T max_or_nan(T a, T b) {
    const T larger = a > b ? a : b;
    return a != a ? a : larger;
}

template <class T, bool kCoupled>
inline void update_run(T* __restrict w, T* __restrict m, T* __restrict u,
    const T* __restrict g, int64_t length, Scalars<T> s) {
    for (int64_t i = 0; i < length; ++i) {
        T gradient = s.scale * g[i];
        gradient = gradient > s.clipvalue ? s.clipvalue : gradient;
        gradient = gradient < -s.clipvalue ? -s.clipvalue : gradient;
        if (kCoupled) gradient = gradient + s.coupled_decay * w[i];
        const T size = magnitude(gradient);
        const T moment = m[i] + s.one_minus_beta_1 * (gradient - m[i]);
        const T norm = max_or_nan(s.beta_2 * u[i], size);
        m[i] = moment;
        u[i] = norm;
        w[i] = s.decay * w[i] - s.step_size * quotient(moment, norm + s.epsilon);
    }
}

template <class T>
void update(T* w, T* m, T* u, const T* g, int64_t length, const Scalars<T>& s) {
    // Without coupled decay an infinite parameter must not make the gradient NaN.
    if (s.coupled_decay == 0) {
        update_run<T, false>(w, m, u, g, length, s);
    } else {
        update_run<T, true>(w, m, u, g, length, s);
    }
}

// Brings a stale row up to date: `_core/exact.py` has the mathematics.
template <class T>
inline void catch_up_runs(
    T* __restrict w, T* __restrict m, T* __restrict u, int64_t length, Gap<T> gap) {
    constexpr int64_t kRun = 128;
    T a[kRun], b[kRun], x[kRun];
    for (int64_t start = 0; start < length; start += kRun) {
        const int64_t run = length - start < kRun ? length - start : kRun;
        T* __restrict const w_run = w + start;
        T* __restrict const m_run = m + start;
        T* __restrict const u_run = u + start;
        for (int64_t i = 0; i < run; ++i) {
            a[i] = b[i] = 0;
            x[i] = 4 * quotient(u_run[i], u_run[i] + gap.epsilon) - 2;
        }
        // Clenshaw's recurrence for a Chebyshev series in `x / 2`, four terms at a time.
        for (int64_t n = gap.terms - 4; n > 0; n -= 4) {
            const T s0 = gap.sums[n], s1 = gap.sums[n + 1];
            const T s2 = gap.sums[n + 2], s3 = gap.sums[n + 3];
            for (int64_t i = 0; i < run; ++i) {
                const T b3 = s3 + x[i] * a[i] - b[i];
                const T b2 = s2 + x[i] * b3 - a[i];
                const T b1 = s1 + x[i] * b2 - b3;
                a[i] = s0 + x[i] * b1 - b2;
                b[i] = b1;
            }
        }
        for (int64_t i = 0; i < run; ++i) {
            const T norm = u_run[i], moment = m_run[i];
            const T series = gap.sums[0] + T(0.5) * x[i] * a[i] - b[i];
            w_run[i] = gap.of_w * w_run[i] - quotient(moment, norm + gap.epsilon) * series;
            m_run[i] = gap.of_m * moment;
            u_run[i] = gap.of_u * norm;
        }
    }
}

template <class T>
void catch_up(T* w, T* m, T* u, int64_t length, const Gap<T>& gap) {
    catch_up_runs(w, m, u, length, gap);
}

}  // namespace adamax::ADAMAX_ISA
