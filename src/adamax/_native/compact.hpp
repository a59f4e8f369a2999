// Compact state: rounding by random bits, and state in eight bits.
//
// In operations that every compiler vectorises and that give the same bits on every
// instruction set; those of _core/compact.py, which has the mathematics. In the namespace
// ADAMAX_ISA, see rule.hpp.

#include "float16.hpp"
#include "storage.hpp"

namespace adamax::ADAMAX_ISA {

inline uint32_t random_bits(RandomKey key, uint32_t number) {
    uint32_t x = (number ^ key.a) * 0x7FEB352Du;
    x = ((x ^ (x >> 15)) + key.b) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

inline void round_bfloat16(const float* __restrict numbers, uint16_t* __restrict words,
    int64_t length, RandomKey key, uint32_t number) {
    for (int64_t i = 0; i < length; ++i) {
        const uint32_t bits = bit_cast<uint32_t>(numbers[i]);
        const uint32_t size = bits & 0x7FFFFFFF;
        const uint32_t added =
            (size + (random_bits(key, number + uint32_t(i)) >> 16)) >> 16;
        uint32_t result = added < 0x7F7F ? added : 0x7F7F;  // finite stays finite
        result = size >= 0x7F800000 ? size >> 16 : result;
        result = size > 0x7F800000 ? result | 0x40 : result;
        words[i] = uint16_t(result | ((bits >> 16) & 0x8000));
    }
}

constexpr int32_t kNotFinite = 255;          // the code of u where m or u is not finite
constexpr int32_t kLargest = 254;            // and of the largest norms
constexpr int32_t kSmallestPower = 40;       // codes are quarters of octaves from 2**-40 on
constexpr float kMomentCodes = 127 / 1.25f;  // for one norm

// 2**(code / 4 - 40) and 2**(40 - code / 4).
inline float power_of(int32_t code) {
    // Masks rather than conditions, which GCC would make branches of.
    const int32_t odd = -(code & 1), upper = -(code >> 1 & 1);
    const int32_t low = odd & 0x1837F0, high = 0x3504F3 + (odd & (0x5744FD - 0x3504F3));
    const int32_t exponent = (code >> 2) + (127 - kSmallestPower);
    return bit_cast<float>((exponent << 23) | (low + (upper & (high - low))));
}
inline float inverse_power_of(int32_t code) { return power_of(8 * kSmallestPower - code); }

inline void decode(const int8_t* __restrict m_codes, const uint8_t* __restrict u_codes,
    float* __restrict m, float* __restrict u, int64_t length, double factor) {
    const float of_u = float(1 / factor), of_m = 1 / kMomentCodes;
    for (int64_t i = 0; i < length; ++i) {
        const int32_t code = u_codes[i];
        const int32_t bits = bit_cast<int32_t>(power_of(code) * of_u) & -int32_t(code > 0);
        const int32_t nan = -int32_t(code == kNotFinite) & 0x7FC00000;
        const float norm = bit_cast<float>(bits | nan);
        u[i] = norm;
        m[i] = float(m_codes[i]) * of_m * norm;
    }
}

inline void encode(const float* __restrict m, const float* __restrict u,
    int8_t* __restrict m_codes, uint8_t* __restrict u_codes, int64_t length, double factor,
    RandomKey key, uint32_t number) {
    // Halfway between two codes: the mantissas of 2**(1/8), 2**(3/8), 2**(5/8), 2**(7/8).
    constexpr int32_t kHalfway[] = {0xB95C2, 0x25FED7, 0x45672B, 0x6AC0C7};
    const float of_u = float(factor), of_m = float(kMomentCodes * factor);
    for (int64_t i = 0; i < length; ++i) {
        const int32_t bits = bit_cast<int32_t>(u[i] * of_u);
        const int32_t mantissa = bits & 0x7FFFFF;
        int32_t code = ((bits >> 23) - (127 - kSmallestPower)) * 4;
        for (int32_t each : kHalfway) code += mantissa >= each;
        code = code < 0 ? 0 : code;
        code = code > kLargest ? kLargest : code;
        float level = m[i] * inverse_power_of(code) * of_m;
        level = level > -127 ? level : -127;
        level = level < 127 ? level : 127;
        const uint32_t random = random_bits(key, number + uint32_t(i)) >> 16;
        // What is truncated is positive, so this rounds down.
        int32_t rounded = int32_t(level + float(int32_t(random)) * 0x1p-16f + 128) - 128;
        rounded = rounded > 127 ? 127 : rounded;
        m_codes[i] = int8_t(rounded & -int32_t(code > 0));
        const float zero = (m[i] - m[i]) + (u[i] - u[i]);
        u_codes[i] = uint8_t(zero == 0 ? code : kNotFinite);
    }
}

}  // namespace adamax::ADAMAX_ISA
