// The dtypes of what lies in memory.
#pragma once

#include <cstdint>

namespace adamax {

enum class Dtype : uint8_t {
    kFloat32,
    kFloat64,
    kFloat16,
    kBFloat16,
    kInt32,
    kInt64,
    kUInt32
};

inline int64_t itemsize(Dtype dtype) {
    switch (dtype) {
        case Dtype::kFloat16:
        case Dtype::kBFloat16: return 2;
        case Dtype::kFloat64:
        case Dtype::kInt64: return 8;
        default: return 4;
    }
}

inline bool is_float(Dtype dtype) { return dtype <= Dtype::kBFloat16; }

// Which type the arithmetic on parameters of this dtype is done in, and their state is of.
inline Dtype arithmetic_of(Dtype dtype) {
    return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

}  // namespace adamax
