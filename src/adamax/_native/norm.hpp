// L2 norms whose squares may leave the range of float64.
#pragma once

#include <cmath>

#include "elements.hpp"

namespace adamax {

// The norm `scale * sqrt(sum)`; scale is a power of two.
struct Norm {
    double scale = 1;
    double sum = 0;

    void add(const Norm& other) {
        if (other.sum == 0) return;
        if (sum == 0) {
            *this = other;
        } else if (scale >= other.scale) {
            const double ratio = other.scale / scale;
            sum += other.sum * ratio * ratio;
        } else {
            const double ratio = scale / other.scale;
            sum = other.sum + sum * ratio * ratio;
            scale = other.scale;
        }
    }

    static Norm of(const double* numbers, int64_t count) {
        const double sum = loops().on_double.square_sum(numbers, count);
        if (sum > 1e-200 && sum < 1e300) return {1, sum};
        double largest = 0;
        for (int64_t i = 0; i < count; ++i) {
            const double size = std::fabs(numbers[i]);
            largest = size > largest ? size : largest;
        }
        if (sum != sum || largest - largest != 0) return {1, sum};  // NaN or infinity
        if (largest == 0) return {};
        Norm norm{std::ldexp(1.0, std::ilogb(largest)), 0};
        for (int64_t i = 0; i < count; ++i) {
            const double part = numbers[i] / norm.scale;
            norm.sum += part * part;
        }
        return norm;
    }

    double value() const { return scale * std::sqrt(sum); }

    // What a gradient of this norm is multiplied by so that its norm is at most `limit`.
    double clip_factor(double limit) const {
        return value() <= limit ? 1.0 : limit / scale / std::sqrt(sum);
    }
};

}  // namespace adamax
