// 16-bit floats: their conversions to and from float.
//
// In integer arithmetic, which every compiler vectorises and which gives the same bits,
// those of NaNs included, on every instruction set. In the namespace ADAMAX_ISA, see
// rule.hpp.

#include <cstdint>
#include <cstring>

namespace adamax::ADAMAX_ISA {

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float widen_bfloat16(uint16_t word) { return bit_cast<float>(uint32_t(word) << 16); }

// Rounds to nearest, ties to even.
inline uint16_t narrow_bfloat16(float number) {
    const uint32_t bits = bit_cast<uint32_t>(number);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40;
    return uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet_nan : rounded);
}

inline float widen_float16(uint16_t word) {
    const uint32_t size = word & 0x7FFF;
    const uint32_t normal = (size << 13) + ((127 - 15) << 23);
    const uint32_t special = (size << 13) | 0x7F800000;
    const uint32_t subnormal = bit_cast<uint32_t>(float(int32_t(size)) * 0x1p-24f);
    uint32_t bits = size >= 0x7C00 ? special : normal;
    bits = size < 0x0400 ? subnormal : bits;
    return bit_cast<float>(bits | (uint32_t(word & 0x8000) << 16));
}

// Rounds to nearest, ties to even.
inline uint16_t narrow_float16(float number) {
    const uint32_t bits = bit_cast<uint32_t>(number);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t size = bits & 0x7FFFFFFF;
    const uint32_t rounded = size + 0xFFF + ((size >> 13) & 1);
    const uint32_t normal = (rounded - ((127 - 15) << 23)) >> 13;
    // Adding 0.5 leaves as many bits as the result has, correctly rounded.
    const uint32_t subnormal =
        bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3F000000;
    const uint32_t quiet_nan = ((size >> 13) & 0x1FF) | 0x7E00;
    uint32_t result = size < 0x38800000 ? subnormal : normal;
    result = size >= 0x477FF000 ? 0x7C00 : result;
    result = size > 0x7F800000 ? quiet_nan : result;
    return uint16_t(result | sign);
}

}  // namespace adamax::ADAMAX_ISA
