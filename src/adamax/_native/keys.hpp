// Row indices, grouped: sorted keys with the row in the high bits, the position in the low.
#pragma once

#include <memory>

#include "view.hpp"

namespace adamax {

class Keys {
  public:
    enum class Outside { kRefuse, kSkip };

    // Returns the position of the first index outside [0, rows), which `outside` gets, or
    // -1. Where these are skipped, they have no keys. `indices` are int32 or int64, of one
    // dimension. Throws std::bad_alloc, or std::length_error where rows and positions do
    // not fit into 64 bits.
    int64_t build(const View& indices, int64_t rows, int64_t* outside,
        Outside if_outside = Outside::kRefuse);

    int64_t count() const { return count_; }
    int64_t row(int64_t i) const { return int64_t(keys_[i] >> shift_); }
    int64_t position(int64_t i) const { return int64_t(keys_[i] & mask_); }

    // The first key in [start, stop) at which a row begins, or `stop`.
    int64_t next_row(int64_t start, int64_t stop) const {
        if (start > 0) {
            const int64_t before = row(start - 1);
            while (start < stop && row(start) == before) ++start;
        }
        return start;
    }
    int64_t end_of_row(int64_t start) const {
        const int64_t its = row(start);
        int64_t end = start + 1;
        while (end < count_ && row(end) == its) ++end;
        return end;
    }

  private:
    std::unique_ptr<uint64_t[]> memory_;
    const uint64_t* keys_ = nullptr;
    int64_t count_ = 0;
    int shift_ = 0;
    uint64_t mask_ = 0;
};

}  // namespace adamax
