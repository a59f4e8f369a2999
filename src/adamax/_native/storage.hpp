// The dtypes of what lies in memory, and the frames of 8-bit state.
#pragma once

#include <cmath>
#include <cstdint>

namespace adamax {

enum class Dtype : uint8_t {
    kFloat32,
    kFloat64,
    kFloat16,
    kBFloat16,
    kInt32,
    kInt64,
    kUInt32,
    kInt8,
    kUInt8
};

inline int64_t itemsize(Dtype dtype) {
    switch (dtype) {
        case Dtype::kFloat16:
        case Dtype::kBFloat16: return 2;
        case Dtype::kFloat64:
        case Dtype::kInt64: return 8;
        case Dtype::kInt8:
        case Dtype::kUInt8: return 1;
        default: return 4;
    }
}

inline bool is_float(Dtype dtype) { return dtype <= Dtype::kBFloat16; }

// Which type the arithmetic on parameters of this dtype is done in, and their state is of.
inline Dtype arithmetic_of(Dtype dtype) {
    return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

// How a norm is kept in eight bits: `_core/compact.py` has the mathematics. A frame is what
// the norms have decayed by since their codes last changed, in quarters of an octave, from
// 0 to before 1.
struct Frame {
    float before = 0;
    float after = 0;

    // What is added to it where norms are multiplied by `decay`; infinity for 0.
    static double shift_of(double decay) { return -4 * std::log2(decay); }
    static Frame shifted(float before, double shift) {
        const double sum = before + shift;
        const float after = float(sum - std::floor(sum));
        return {before, after < 1 ? after : 0};  // 0 also where it is not a number
    }
    // 2**(frame / 4), by a series whose bits are the same everywhere.
    static double factor(float frame) {
        constexpr double kInverse[] = {
            1.0 / 2, 1.0 / 3, 1.0 / 4, 1.0 / 5, 1.0 / 6, 1.0 / 7, 1.0 / 8, 1.0 / 9};
        const double exponent = frame * 0x1.62e42fefa39efp-3;  // log(2) / 4
        double sum = 1;
        for (int i = 8; i-- > 0;) sum = 1 + exponent * kInverse[i] * sum;
        return 1 + exponent * sum;
    }
};

// The random bits that round an element: of a step, an operand and the element's number.
struct RandomKey {
    uint32_t a, b;

    RandomKey(uint64_t seed, int operand, int64_t number)
        : RandomKey(mixed(mixed(seed) + uint64_t(number >> 32) * 4 + uint64_t(operand))) {}

  private:
    explicit RandomKey(uint64_t word) : a(uint32_t(word)), b(uint32_t(word >> 32)) {}

    static uint64_t mixed(uint64_t word) {  // the finaliser of splitmix64
        word += 0x9E3779B97F4A7C15u;
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
        word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
        return word ^ (word >> 31);
    }
};

// How what is narrower than the arithmetic is rounded when it is written.
struct Rounding {
    uint64_t seed = 0;        // of the random bits
    bool stochastic = false;  // whether parameters of bfloat16 are, too
    Frame frame{};
};

}  // namespace adamax
