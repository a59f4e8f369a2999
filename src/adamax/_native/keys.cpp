#include "keys.hpp"

#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "elements.hpp"

namespace adamax {
namespace {

constexpr int kRadixBits = 11;

int bits_of(uint64_t number) {
    int bits = 0;
    for (; number; number >>= 1) ++bits;
    return bits;
}

// Sorts by the row, at most `largest`; equal rows keep their order. Returns the sorted
// keys, which are in one of the two.
uint64_t* sorted(
    uint64_t* keys, uint64_t* scratch, int64_t count, int shift, uint64_t largest) {
    const int bits = std::max(bits_of(largest), 1);
    const int passes = (bits + kRadixBits - 1) / kRadixBits;
    const int width = (bits + passes - 1) / passes;
    const uint64_t mask = (uint64_t(1) << width) - 1;
    std::vector<int64_t> places(size_t(1) << width);
    for (int digit = 0; digit < passes; ++digit) {
        const int low = shift + digit * width;
        std::fill(places.begin(), places.end(), 0);
        for (int64_t i = 0; i < count; ++i) ++places[(keys[i] >> low) & mask];
        int64_t place = 0;
        for (int64_t& occurrences : places) place += std::exchange(occurrences, place);
        for (int64_t i = 0; i < count; ++i) {
            scratch[places[(keys[i] >> low) & mask]++] = keys[i];
        }
        std::swap(keys, scratch);
    }
    return keys;
}

}  // namespace

int64_t Keys::build(
    const View& indices, int64_t rows, int64_t* outside, Outside if_outside) {
    const int64_t given = indices.shape[0];
    count_ = 0;
    shift_ = bits_of(uint64_t(given > 1 ? given - 1 : 0));
    mask_ = (uint64_t(1) << shift_) - 1;
    if (shift_ + bits_of(uint64_t(rows)) > 64) throw std::length_error("too many indices");
    memory_.reset(new uint64_t[size_t(2 * given)]);
    uint64_t* keys = memory_.get();
    const int64_t step = indices.strides[0] * indices.unit;
    const bool wide = indices.dtype == Dtype::kInt64;
    bool ascending = true;
    int64_t previous = -1, largest = 0;
    for (int64_t i = 0; i < given; ++i) {
        int64_t row;
        if (wide) {
            gather(indices.data + i * step, 8, indices.swapped, 1, &row);
        } else {
            int32_t narrow;
            gather(indices.data + i * step, 4, indices.swapped, 1, &narrow);
            row = narrow;
        }
        if (row < 0 || row >= rows) {
            if (if_outside == Outside::kSkip) continue;
            *outside = row;
            return i;
        }
        keys[count_++] = (uint64_t(row) << shift_) | uint64_t(i);
        ascending = ascending && row >= previous;
        previous = row;
        largest = std::max(largest, row);
    }
    keys_ =
        ascending ? keys : sorted(keys, keys + count_, count_, shift_, uint64_t(largest));
    return -1;
}

}  // namespace adamax
