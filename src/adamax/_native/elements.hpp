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

// The state of elements in eight bits each, which are the operands 1 and 2.
inline bool is_8bit(const Operand* operands) { return operands[1].dtype == Dtype::kInt8; }

inline void load_8bit(const Places places, const int64_t* steps, int64_t count,
    const Frame& frame, float* m, float* u) {
    uint8_t codes[2][kBlock];
    for (int k = 1; k < 3; ++k) gather(places[k], steps[k], false, count, codes[k - 1]);
    loops().decode(reinterpret_cast<const int8_t*>(codes[0]), codes[1], m, u, count,
        Frame::factor(frame.before));
}

inline void store_8bit(const float* m, const float* u, const Places places,
    const int64_t* steps, int64_t count, const Rounding& rounding, int64_t number) {
    uint8_t codes[2][kBlock];
    loops().encode(m, u, reinterpret_cast<int8_t*>(codes[0]), codes[1], count,
        Frame::factor(rounding.frame.after), {rounding.seed, 1, number}, uint32_t(number));
    for (int k = 1; k < 3; ++k) scatter(codes[k - 1], count, false, places[k], steps[k]);
}

// Elements of w, m and u as numbers of type T: where they lie, or copies of at most kBlock.
template <class T>
class Numbers {
  public:
    T* of[3];

    Numbers(const Operand* operands, const Places places, const int64_t* steps,
        int64_t count, const Rounding& rounding)
        : operands_(operands), steps_(steps), count_(count), rounding_(rounding) {
        for (int k = 0; k < 3; ++k) {
            places_[k] = places[k];
            lies_[k] = is_direct<T>(operands[k], places[k], steps[k]);
            of[k] = lies_[k] ? reinterpret_cast<T*>(places[k]) : own_[k];
            if (!lies_[k] && !(k > 0 && is_8bit(operands))) {
                load(operands[k], places[k], steps[k], count, own_[k]);
            }
        }
        if constexpr (sizeof(T) == sizeof(float)) {
            if (!is_8bit(operands)) return;
            load_8bit(places_, steps, count, rounding.frame, own_[1], own_[2]);
        }
    }

    // Writes copies back. `number` is that of the first element.
    void store_back(int64_t number) {
        for (int k = 0; k < 3; ++k) {
            if (!lies_[k] && !(k > 0 && is_8bit(operands_))) store_one(k, number);
        }
        if constexpr (sizeof(T) == sizeof(float)) {
            if (!is_8bit(operands_)) return;
            store_8bit(own_[1], own_[2], places_, steps_, count_, rounding_, number);
        }
    }

  private:
    void store_one(int k, int64_t number) {
        const bool randomly = k > 0 || rounding_.stochastic;
        if constexpr (sizeof(T) == sizeof(float)) {
            if (randomly && operands_[k].dtype == Dtype::kBFloat16) {
                uint16_t words[kBlock];
                loops().round_bfloat16(
                    own_[k], words, count_, {rounding_.seed, k, number}, uint32_t(number));
                scatter(words, count_, operands_[k].swapped, places_[k], steps_[k]);
                return;
            }
        }
        store(own_[k], count_, operands_[k], places_[k], steps_[k]);
    }

    const Operand* operands_;
    const int64_t* steps_;
    int64_t count_;
    const Rounding& rounding_;
    char* places_[kOperands];
    bool lies_[3];
    T own_[3][kBlock];
};

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
// `direct` has it. `number` is that of the first element.
template <class T, class Gradient>
void update_elements(const Operand* operands, const Places places, const int64_t* steps,
    int64_t number, int64_t count, const Scalars<T>& scalars, const Rounding& rounding,
    const T* direct, const Gradient& gradient) {
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
    T g[kBlock];
    for (int64_t first = 0; first < count; first += kBlock) {
        const int64_t length = std::min(kBlock, count - first);
        Places of_block;
        for (int k = 0; k < 3; ++k) of_block[k] = places[k] + first * steps[k];
        Numbers<T> numbers(operands, of_block, steps, length, rounding);
        const T* of_g = direct ? direct + first : g;
        if (!direct) gradient(first, length, g);
        run.update(numbers.of[0], numbers.of[1], numbers.of[2], of_g, length, scalars);
        numbers.store_back(number + first);
    }
}

}  // namespace adamax
