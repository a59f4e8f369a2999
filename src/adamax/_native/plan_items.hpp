// What the parts of a plan share.
#pragma once

#include "plan.hpp"

namespace adamax {

constexpr int kScalars = 10;

// A list or tuple, whose items may not change while this exists.
class Sequence {
  public:
    explicit Sequence(PyObject* object)
        : tuple_(object ? PySequence_Tuple(object) : nullptr) {}
    ~Sequence() { Py_XDECREF(tuple_); }
    Sequence(const Sequence&) = delete;
    Sequence& operator=(const Sequence&) = delete;

    explicit operator bool() const { return tuple_ != nullptr; }
    Py_ssize_t size() const { return PyTuple_GET_SIZE(tuple_); }
    PyObject* operator[](Py_ssize_t i) const { return PyTuple_GET_ITEM(tuple_, i); }
    PyObject* const* items() const { return &PyTuple_GET_ITEM(tuple_, 0); }

  private:
    PyObject* tuple_;
};

inline bool error(PyObject* kind, const char* message) {
    PyErr_SetString(kind, message);
    return false;
}

inline Scalars<double> scalars_at(const double* s) {
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]};
}

inline Rounding rounding_of(double step, int64_t where, bool stochastic) {
    const uint64_t seed = step >= 0 && step < 0x1p53 ? uint64_t(step) : 0;
    return {seed + uint64_t(where) * 0x9E3779B97F4A7C15u, stochastic, {}};
}

// Has rows lie where views of w, m, u and the values of a gradient are.
void place(const Views& views, Rows* rows);

}  // namespace adamax
