// Everything that is compiled once for each instruction set.
//
// A file that defines ADAMAX_ISA includes this one, and is compiled with its own flags.

#include "compact.hpp"
#include "rule.hpp"

namespace adamax::ADAMAX_ISA {

// In float64, in an order that depends on the length alone.
template <class T>
double square_sum(const T* g, int64_t length) {
    constexpr int64_t kLanes = 16;
    double sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const double number = g[i + lane];
            sums[lane] += number * number;
        }
    }
    double total = 0;
    for (; i < length; ++i) total += double(g[i]) * double(g[i]);
    for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
    return total;
}

template <class T>
void add(double* __restrict sums, const T* __restrict g, int64_t length) {
    for (int64_t i = 0; i < length; ++i) sums[i] += g[i];
}

template <float (*kConvert)(uint16_t)>
void widen(const uint16_t* __restrict words, float* __restrict numbers, int64_t length) {
    for (int64_t i = 0; i < length; ++i) numbers[i] = kConvert(words[i]);
}

template <uint16_t (*kConvert)(float)>
void narrow(const float* __restrict numbers, uint16_t* __restrict words, int64_t length) {
    for (int64_t i = 0; i < length; ++i) words[i] = kConvert(numbers[i]);
}

const Loops kLoops = {
    ADAMAX_ISA_NAME,
    {update<float>, catch_up<float>, square_sum<double>, square_sum<float>, add<float>},
    {update<double>, catch_up<double>, square_sum<double>, square_sum<double>, add<double>},
    widen<widen_float16>,
    widen<widen_bfloat16>,
    narrow<narrow_float16>,
    narrow<narrow_bfloat16>,
    round_bfloat16,
    decode,
    encode,
};

}  // namespace adamax::ADAMAX_ISA
