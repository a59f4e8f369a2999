// From objects of Python to what the verbs work on. Everything that can fail, fails here,
// with the GIL held and before anything is written.
#pragma once

#include <array>

#include "step.hpp"
#include "tensors.hpp"

namespace adamax {

// Why the verbs cannot do what they are asked to: see Problem in _core/kernels.py.
struct Problem {
    const char* kind = nullptr;
    int64_t where = 0;   // which parameter, or behind those which table
    int64_t detail = 0;  // which operand, position or row
    int64_t value = 0;

    explicit operator bool() const { return kind != nullptr; }
};

// A table whose rows are to be caught up, without a gradient.
struct StaleTable {
    Rows rows;
    Stamps stamps;
    History history;
    double epsilon;
};

using Views = std::array<View, kOperands>;  // of w, m, u and g

// Reads the arguments of one call. Methods return false with a Python error, or with a
// problem.
class Plan {
  public:
    Step step;
    Problem problem;

    bool add_parameters(
        PyObject* const columns[kOperands], PyObject* scalars, PyObject* frames);
    bool add_tables(PyObject* tables);
    bool add_counters(PyObject* counters);
    // When all has been added: copies the gradients that overlap what is written.
    bool finish();

    // A table whose rows are to be caught up.
    bool read_table(PyObject* object, StaleTable* table);
    // The values of a gradient alone.
    bool read_values(PyObject* object, View* view);
    bool read_indices(PyObject* object, int64_t rows, Keys* keys);
    // Whether the history goes back to the stamps of rows; with `current`, whether these
    // rows are up to date.
    bool check_stamps(
        const Keys& keys, const Stamps& stamps, const History& history, bool current);
    bool unfit(int operand);

  private:
    bool read(PyObject* object, int operand, View* view);
    bool read_numbers(PyObject* object, Dtype dtype, int ndim, View* view);
    bool read_stamps(PyObject* object, int64_t rows, Stamps* stamps);
    bool read_history(PyObject* history, int offset, History* to, Recorded* recorded);
    bool read_column(PyObject* column, int operand, std::vector<Views>* views);
    bool check_operands(const Views& views);
    bool add_frames(PyObject* frames);
    bool read_frames(PyObject* object, const Views& views, int64_t count, float** frames);
    bool add_table(PyObject* const* items);
    void copy(View* view);

    Reader reader_;
    int64_t where_ = 0;  // the parameter or table that is being read
    std::vector<Views> of_parameters_, of_tables_;
    std::deque<std::vector<int64_t>> strides_;  // of copies
    std::deque<std::vector<char>> copies_;
};

}  // namespace adamax
