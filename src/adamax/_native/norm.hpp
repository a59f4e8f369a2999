// L2 norms whose squares may leave the range of float64.
#pragma once

#include <cmath>

#include "elements.hpp"
#include "keys.hpp"

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

// Pieces of work, in elements. Norms are added up piece by piece, and blocks within a
// piece, so that they depend neither on the number of threads nor on the layout of a
// gradient.
constexpr int64_t kNormPiece = 64 * 1024;

// A gradient alone, its elements in the order of their indices.
class Gradient {
  public:
    // A dense one, or with `keys` the values of a sparse one.
    explicit Gradient(const View& view, const Keys* keys = nullptr)
        : operand_(Operand::of(view)), base_(view.data), keys_(keys) {
        walk_.build_in_order(view, keys ? 1 : 0);
        if (keys) row_step_ = view.strides[0] * view.unit;
    }

    int64_t length() const { return walk_.length() * (keys_ ? keys_->count() : 1); }
    int64_t pieces() const {
        return keys_ ? (keys_->count() + keys_of_piece() - 1) / keys_of_piece()
                     : (walk_.length() + kNormPiece - 1) / kNormPiece;
    }

    Norm norm(int64_t piece) const {
        Norm norm;
        double numbers[kBlock];
        if (!keys_) {
            const int64_t start = piece * kNormPiece;
            const int64_t stop = std::min(start + kNormPiece, walk_.length());
            for (int64_t first = start; first < stop; first += kBlock) {
                const int64_t count = std::min(kBlock, stop - first);
                load_block(base_, first, count, numbers);
                norm.add(Norm::of(numbers, count));
            }
            return norm;
        }
        const int64_t start = piece * keys_of_piece();
        const int64_t stop = std::min(start + keys_of_piece(), keys_->count());
        for (int64_t i = keys_->next_row(start, stop); i < stop;) {
            const int64_t end = keys_->end_of_row(i);
            for (int64_t first = 0; first < walk_.length(); first += kBlock) {
                const int64_t count = std::min(kBlock, walk_.length() - first);
                double sums[kBlock] = {};
                for (int64_t j = i; j < end; ++j) {
                    load_block(
                        base_ + keys_->position(j) * row_step_, first, count, numbers);
                    loops().on_double.add(sums, numbers, count);
                }
                norm.add(Norm::of(sums, count));
            }
            i = end;
        }
        return norm;
    }

  private:
    int64_t keys_of_piece() const {
        return std::max<int64_t>(1, kNormPiece / 16 / std::max<int64_t>(walk_.length(), 1));
    }

    void load_block(const char* base, int64_t start, int64_t count, double* numbers) const {
        const char* const bases[kOperands] = {base, base, base, base};
        walk_.each_run(bases, start, start + count,
            [&](const Places& places, int64_t first, int64_t length) {
                load(operand_, places[0], walk_.step[0], length, numbers + (first - start));
            });
    }

    Operand operand_;
    const char* base_;
    const Keys* keys_;
    int64_t row_step_ = 0;
    Walk walk_;
};

}  // namespace adamax
