// Runs of elements in any dtype, stride and byte order, as numbers the loops work on.
#pragma once

#include <cstring>

#include "loops.hpp"
#include "walk.hpp"

namespace adamax {

constexpr int64_t kBlock = 512;  // elements at once where they must be converted

template <class T>
constexpr Dtype dtype_of() {
    return sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
}

// Whether elements at a place are numbers of type T that loops can work on where they lie.
template <class T>
bool is_direct(const Operand& operand, const char* place, int64_t step) {
    return operand.dtype == dtype_of<T>() && step == int64_t(sizeof(T)) &&
           !operand.swapped && reinterpret_cast<uintptr_t>(place) % sizeof(T) == 0;
}

template <class Word>
Word byte_swapped(Word word) {
    unsigned char bytes[sizeof word];
    std::memcpy(bytes, &word, sizeof word);
    std::reverse(bytes, bytes + sizeof word);
    std::memcpy(&word, bytes, sizeof word);
    return word;
}

template <class Word>
void gather(const char* place, int64_t step, bool swapped, int64_t count, Word* words) {
    if (step == int64_t(sizeof(Word)) && !swapped) {
        std::memcpy(words, place, size_t(count) * sizeof(Word));
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        std::memcpy(&words[i], place + i * step, sizeof(Word));
        if (swapped) words[i] = byte_swapped(words[i]);
    }
}

template <class Word>
void scatter(const Word* words, int64_t count, bool swapped, char* place, int64_t step) {
    if (step == int64_t(sizeof(Word)) && !swapped) {
        std::memcpy(place, words, size_t(count) * sizeof(Word));
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        const Word word = swapped ? byte_swapped(words[i]) : words[i];
        std::memcpy(place + i * step, &word, sizeof(Word));
    }
}

// At most kBlock elements as numbers of type T, which float64 is rounded to.
template <class T>
void load(
    const Operand& operand, const char* place, int64_t step, int64_t count, T* numbers) {
    if (operand.dtype == dtype_of<T>()) {
        gather(place, step, operand.swapped, count, numbers);
    } else if (operand.dtype == Dtype::kFloat64) {
        double wide[kBlock];
        gather(place, step, operand.swapped, count, wide);
        for (int64_t i = 0; i < count; ++i) numbers[i] = T(wide[i]);
    } else {
        float narrow[kBlock];
        if (operand.dtype == Dtype::kFloat32) {
            gather(place, step, operand.swapped, count, narrow);
        } else {
            uint16_t words[kBlock];
            gather(place, step, operand.swapped, count, words);
            const bool brain = operand.dtype == Dtype::kBFloat16;
            (brain ? loops().widen_bfloat16 : loops().widen_float16)(words, narrow, count);
        }
        for (int64_t i = 0; i < count; ++i) numbers[i] = T(narrow[i]);
    }
}

// The other way round, for a parameter or state: of T, or of 16 bits where T is float.
template <class T>
void store(
    const T* numbers, int64_t count, const Operand& operand, char* place, int64_t step) {
    if (operand.dtype == dtype_of<T>()) {
        scatter(numbers, count, operand.swapped, place, step);
    } else if constexpr (sizeof(T) == sizeof(float)) {
        uint16_t words[kBlock];
        const bool brain = operand.dtype == Dtype::kBFloat16;
        (brain ? loops().narrow_bfloat16 : loops().narrow_float16)(numbers, words, count);
        scatter(words, count, operand.swapped, place, step);
    }
}

// A gradient on its way into the arithmetic: scaled before it is rounded, where it is
// wider.
template <class T>
void load_gradient(const Operand& g, const char* place, int64_t step, int64_t count,
    double scale, T* numbers) {
    double wide[kBlock];
    load(g, place, step, count, wide);
    for (int64_t i = 0; i < count; ++i) numbers[i] = T(scale * wide[i]);
}

// Finite numbers stay finite in T, so that they make no NaN of a zero.
template <class T>
T rounded(double number) {
    constexpr double kLargest = sizeof(T) == 8 ? 0x1.fffffffffffffp+1023 : 0x1.fffffep+127;
    if (number > kLargest && number - number == 0) return T(kLargest);
    if (number < -kLargest && number - number == 0) return T(-kLargest);
    return T(number);
}

template <class T>
Scalars<T> rounded(const Scalars<double>& s) {
    return {rounded<T>(s.step_size), rounded<T>(s.decay), rounded<T>(s.scale),
        rounded<T>(s.coupled_decay), rounded<T>(s.one_minus_beta_1), rounded<T>(s.beta_2),
        rounded<T>(s.epsilon), rounded<T>(s.clipvalue)};
}

// The rule on elements of w, m and u that the loops may be unable to work on where they
// lie. `gradient(first, count, numbers)` writes what they would load of the gradient, or
// `direct` has it.
template <class T, class Gradient>
void update_elements(const Operand* operands, const Places places, const int64_t* steps,
    int64_t count, const Scalars<T>& scalars, const T* direct, const Gradient& gradient) {
    const auto& run = loops().of(T());
    bool in_place = true;
    for (int k = 0; k < 3; ++k) {
        in_place = in_place && is_direct<T>(operands[k], places[k], steps[k]);
    }
    if (in_place && direct) {
        auto numbers = [&](int k) { return reinterpret_cast<T*>(places[k]); };
        run.update(numbers(0), numbers(1), numbers(2), direct, count, scalars);
        return;
    }
    T own[3][kBlock], g[kBlock];
    for (int64_t first = 0; first < count; first += kBlock) {
        const int64_t length = std::min(kBlock, count - first);
        T* numbers[3];
        bool lies[3];
        for (int k = 0; k < 3; ++k) {
            char* place = places[k] + first * steps[k];
            lies[k] = is_direct<T>(operands[k], place, steps[k]);
            numbers[k] = lies[k] ? reinterpret_cast<T*>(place) : own[k];
            if (!lies[k]) load(operands[k], place, steps[k], length, own[k]);
        }
        const T* of_g = direct ? direct + first : g;
        if (!direct) gradient(first, length, g);
        run.update(numbers[0], numbers[1], numbers[2], of_g, length, scalars);
        for (int k = 0; k < 3; ++k) {
            char* place = places[k] + first * steps[k];
            if (!lies[k]) store(own[k], length, operands[k], place, steps[k]);
        }
    }
}

}  // namespace adamax
