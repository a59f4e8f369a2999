// Reading arrays of NumPy and tensors of PyTorch, in the call that uses them.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <deque>
#include <vector>

#include "view.hpp"

namespace adamax {

bool import_numpy();  // once; false with a Python error

// Reads objects for one call, and owns a reference to each until the call ends, since
// another thread may replace what a list holds.
class Reader {
  public:
    Reader() { owned_.reserve(64); }
    ~Reader();
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    // Whether this thread may let go of objects, which needs the GIL.
    static thread_local bool may_release;

    enum class Result { kRead, kUnfit, kError };

    // kUnfit is for what is no strided memory of this machine, or of another dtype: nothing
    // that the verbs could work on. kError comes with a Python error.
    // To check a number for lazy negation takes longer than to read it.
    Result read(PyObject* object, View* view, bool checks_negation = true);

  private:
    Result read_exchanged(PyObject* object, View* view);
    Result read_attributes(PyObject* object, View* view);
    Result find_exchange(PyObject* object);

    std::vector<PyObject*> owned_;
    std::deque<std::vector<int64_t>> dims_;  // of what was read through attributes
    PyTypeObject* type_ = nullptr;           // of the last tensor, and what it offers
    const void* exchange_ = nullptr;
};

}  // namespace adamax
