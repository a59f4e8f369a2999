// Memory with a shape, whatever it is of: an array of NumPy, a tensor of PyTorch, a buffer.
#pragma once

#include "storage.hpp"

namespace adamax {

constexpr int kMostDims = 64;  // of NumPy

// Shape and strides belong to the object that the view is of.
struct View {
    char* data = nullptr;
    const int64_t* shape = nullptr;
    const int64_t* strides = nullptr;  // in units
    int ndim = 0;
    int64_t unit = 1;  // of strides, in bytes
    Dtype dtype = Dtype::kFloat32;
    bool complex = false;  // then each element is two numbers of this dtype
    bool swapped = false;  // of the other byte order
    bool writeable = true;

    int64_t length(int from = 0) const {  // of the dimensions from one on, in numbers
        int64_t product = complex ? 2 : 1;
        for (int i = from; i < ndim; ++i) product *= shape[i];
        return product;
    }
    int64_t element_size() const { return itemsize(dtype) * (complex ? 2 : 1); }
    bool is_contiguous() const {
        int64_t expected = element_size();
        for (int i = ndim; i-- > 0;) {
            if (shape[i] != 1 && strides[i] * unit != expected) return length() == 0;
            expected *= shape[i];
        }
        return true;
    }
    bool is_aligned() const {
        if (reinterpret_cast<uintptr_t>(data) % itemsize(dtype)) return false;
        for (int i = 0; i < ndim; ++i) {
            if (strides[i] * unit % itemsize(dtype)) return false;
        }
        return true;
    }
    // Whether dimensions reach into each other's strides, so that elements may share
    // memory.
    bool may_overlap_itself() const {
        int64_t reach = element_size(), done = 0;
        for (int round = 0; round < ndim; ++round) {  // from the smallest stride on
            int next = -1;
            for (int i = 0; i < ndim; ++i) {
                if (done >> i & 1 || shape[i] <= 1) continue;
                if (next < 0 || step(i) < step(next)) next = i;
            }
            if (next < 0) break;
            if (step(next) < reach) return true;
            reach += step(next) * (shape[next] - 1);
            done |= int64_t(1) << next;
        }
        return false;
    }
    int64_t step(int i) const { return (strides[i] < 0 ? -strides[i] : strides[i]) * unit; }
    // The memory that lies between the first byte and the last.
    void bounds(uintptr_t* begin, uintptr_t* end) const {
        *begin = *end = reinterpret_cast<uintptr_t>(data);
        if (length() == 0) return;
        for (int i = 0; i < ndim; ++i) {
            const int64_t reach = (shape[i] - 1) * strides[i] * unit;
            (reach < 0 ? *begin : *end) += uintptr_t(reach);
        }
        *end += uintptr_t(element_size());
    }
};

inline bool same_shape(const View& a, const View& b) {
    if (a.ndim != b.ndim || a.complex != b.complex) return false;
    for (int i = 0; i < a.ndim; ++i) {
        if (a.shape[i] != b.shape[i]) return false;
    }
    return true;
}

}  // namespace adamax
