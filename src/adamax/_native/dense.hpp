// The rule on whole parameters.
#pragma once

#include "norm.hpp"

namespace adamax {

// Pieces of work: large enough that taking one costs nothing, small enough to balance.
constexpr int64_t kDensePiece = 32 * 1024;

struct Parameter {
    Operand operands[kOperands];
    const char* base[kOperands];  // where the first element is
    Walk walk;
    Scalars<double> scalars;
    Rounding rounding;
    float* frame = nullptr;  // of 8-bit state

    int64_t length() const { return walk.length(); }
    bool is_double() const { return operands[0].dtype == Dtype::kFloat64; }

    // The rule on the elements from `start` to before `stop`.
    void update(int64_t start, int64_t stop) const {
        is_double() ? update_as<double>(start, stop) : update_as<float>(start, stop);
    }

    // When all of it has been updated.
    void advance() const {
        if (frame) *frame = rounding.frame.after;
    }

  private:
    template <class T>
    void update_as(int64_t start, int64_t stop) const {
        const Operand& g = operands[3];
        const int64_t step = walk.step[3];
        // A gradient that is wider than the arithmetic is scaled before it is rounded.
        const bool wide = g.dtype == Dtype::kFloat64 && sizeof(T) == sizeof(float);
        Scalars<T> s = rounded<T>(scalars);
        if (wide) s.scale = 1;
        walk.each_run(
            base, start, stop, [&](const Places& places, int64_t number, int64_t count) {
                const bool direct = is_direct<T>(g, places[3], step);
                update_elements<T>(operands, places, walk.step, number, count, s, rounding,
                    direct ? reinterpret_cast<const T*>(places[3]) : nullptr,
                    [&](int64_t first, int64_t length, T* numbers) {
                        const char* place = places[3] + first * step;
                        if (wide) {
                            load_gradient(g, place, step, length, scalars.scale, numbers);
                        } else {
                            load(g, place, step, length, numbers);
                        }
                    });
            });
    }
};

}  // namespace adamax
