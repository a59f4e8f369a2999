#include "tensors.hpp"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include <cstddef>
#include <cstring>

namespace adamax {
namespace {

// The part of DLPack's C exchange API (version 1) that is used here, see
// https://dmlc.github.io/dlpack/latest/python_spec.html.
struct DLDataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct DLTensor {
    void* data;
    int32_t device_type;
    int32_t device_id;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct DLPackExchangeAPI {
    uint32_t major, minor;
    const DLPackExchangeAPI* previous;
    void* unused[3];
    int (*from_object_no_sync)(void* object, DLTensor* out);
    void* current_stream;
};

static_assert(sizeof(DLTensor) == 48 && offsetof(DLTensor, byte_offset) == 40);
static_assert(offsetof(DLPackExchangeAPI, from_object_no_sync) == 40);

constexpr int kCpu = 1;
enum Code { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kComplex = 5 };

bool set_dtype(int code, int bits, View* view) {
    view->complex = code == kComplex;
    if (view->complex) {
        code = kFloat;
        bits /= 2;
    }
    if (code == kFloat && bits == 32) view->dtype = Dtype::kFloat32;
    else if (code == kFloat && bits == 64) view->dtype = Dtype::kFloat64;
    else if (code == kFloat && bits == 16) view->dtype = Dtype::kFloat16;
    else if (code == kBFloat && bits == 16) view->dtype = Dtype::kBFloat16;
    else if (code == kInt && bits == 32) view->dtype = Dtype::kInt32;
    else if (code == kInt && bits == 64) view->dtype = Dtype::kInt64;
    else if (code == kInt && bits == 8) view->dtype = Dtype::kInt8;
    else if (code == kUInt && bits == 8) view->dtype = Dtype::kUInt8;
    else return false;
    return true;
}

bool set_numpy_dtype(PyArray_Descr* descr, View* view) {
    switch (descr->type_num) {
        case NPY_FLOAT: return set_dtype(kFloat, 32, view);
        case NPY_DOUBLE: return set_dtype(kFloat, 64, view);
        case NPY_HALF: return set_dtype(kFloat, 16, view);
        case NPY_INT:
        case NPY_LONG:
        case NPY_LONGLONG: return set_dtype(kInt, int(8 * PyDataType_ELSIZE(descr)), view);
        case NPY_BYTE: return set_dtype(kInt, 8, view);
        case NPY_UBYTE: return set_dtype(kUInt, 8, view);
        case NPY_UINT:
        case NPY_ULONG: view->dtype = Dtype::kUInt32; return PyDataType_ELSIZE(descr) == 4;
        default: break;
    }
    // The number of ml_dtypes' type is known at run time only.
    const char* name = std::strrchr(descr->typeobj->tp_name, '.');
    name = name ? name + 1 : descr->typeobj->tp_name;
    return descr->type_num >= NPY_USERDEF && !std::strcmp(name, "bfloat16") &&
           set_dtype(kBFloat, 16, view);
}

// A new reference, or null without an error where there is no such attribute.
PyObject* attribute(PyObject* object, const char* name) {
    PyObject* value = PyObject_GetAttrString(object, name);
    if (!value && PyErr_ExceptionMatches(PyExc_AttributeError)) PyErr_Clear();
    return value;
}

PyObject* called(PyObject* object, const char* method) {
    return PyObject_CallMethod(object, method, nullptr);
}

bool is_true(PyObject* object, const char* method, bool* error) {
    PyObject* answer = called(object, method);
    const int truth = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    *error = truth < 0;
    return truth > 0;
}

bool read_integers(PyObject* sequence, std::vector<int64_t>* numbers) {
    PyObject* fast = sequence ? PySequence_Fast(sequence, "expected a sequence") : nullptr;
    if (!fast) return false;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast); ++i) {
        numbers->push_back(PyLong_AsLongLong(PySequence_Fast_GET_ITEM(fast, i)));
    }
    Py_DECREF(fast);
    return !PyErr_Occurred();
}

}  // namespace

bool import_numpy() { return PyArray_ImportNumPyAPI() == 0; }

thread_local bool Reader::may_release = true;

Reader::~Reader() {
    if (!may_release) return;
    for (PyObject* object : owned_) Py_DECREF(object);
}

Reader::Result Reader::read(PyObject* object, View* view, bool checks_negation) {
    owned_.push_back(Py_NewRef(object));
    if (PyArray_Check(object)) {
        auto* array = reinterpret_cast<PyArrayObject*>(object);
        view->data = PyArray_BYTES(array);
        view->ndim = PyArray_NDIM(array);
        view->shape = reinterpret_cast<const int64_t*>(PyArray_DIMS(array));
        view->strides = reinterpret_cast<const int64_t*>(PyArray_STRIDES(array));
        view->unit = 1;
        view->swapped = PyArray_ISBYTESWAPPED(array);
        view->writeable = PyArray_ISWRITEABLE(array);
        return set_numpy_dtype(PyArray_DESCR(array), view) ? Result::kRead : Result::kUnfit;
    }
    if (Py_TYPE(object) != type_) {
        const Result found = find_exchange(object);
        if (found != Result::kRead) return found;
        type_ = Py_TYPE(object);
    }
    const Result result =
        exchange_ ? read_exchanged(object, view) : read_attributes(object, view);
    if (result != Result::kRead) return result;
    view->unit = itemsize(view->dtype) * (view->complex ? 2 : 1);
    view->swapped = false;
    view->writeable = true;
    if (view->ndim > kMostDims) return Result::kUnfit;
    const int64_t length = view->length();
    if (length != 0 && view->data == nullptr) return Result::kUnfit;  // a fake tensor
    // A lazily negated tensor is the imaginary part of a conjugate one: it has holes, or
    // one element. Its memory has the wrong sign.
    if (checks_negation && (length <= 1 || !view->is_contiguous())) {
        bool error = false;
        if (is_true(object, "is_neg", &error)) return Result::kUnfit;
        if (error) return Result::kError;
    }
    return Result::kRead;
}

Reader::Result Reader::find_exchange(PyObject* object) {
    exchange_ = nullptr;
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    PyObject* capsule = attribute(type, "__dlpack_c_exchange_api__");
    if (!capsule) return PyErr_Occurred() ? Result::kError : Result::kRead;
    const auto* api = static_cast<const DLPackExchangeAPI*>(
        PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);  // the type keeps it
    if (!api) return Result::kError;
    while (api && api->major > 1) api = api->previous;
    if (api && api->major == 1 && api->from_object_no_sync) exchange_ = api;
    return Result::kRead;
}

Reader::Result Reader::read_exchanged(PyObject* object, View* view) {
    DLTensor tensor;
    const auto* api = static_cast<const DLPackExchangeAPI*>(exchange_);
    if (api->from_object_no_sync(object, &tensor) != 0) {
        PyErr_Clear();  // a sparse, quantised, meta or conjugate tensor
        return Result::kUnfit;
    }
    if (tensor.device_type != kCpu || tensor.dtype.lanes != 1 ||
        !set_dtype(tensor.dtype.code, tensor.dtype.bits, view)) {
        return Result::kUnfit;
    }
    view->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    view->ndim = tensor.ndim;
    view->shape = tensor.shape;
    view->strides = tensor.strides;
    return Result::kRead;
}

// For versions of PyTorch without the exchange API.
Reader::Result Reader::read_attributes(PyObject* object, View* view) {
    static const struct {
        const char* name;
        int code, bits;
    } kDtypes[] = {
        {"torch.float32", kFloat, 32},
        {"torch.float64", kFloat, 64},
        {"torch.float16", kFloat, 16},
        {"torch.bfloat16", kBFloat, 16},
        {"torch.int32", kInt, 32},
        {"torch.int64", kInt, 64},
        {"torch.int8", kInt, 8},
        {"torch.uint8", kUInt, 8},
        {"torch.complex64", kComplex, 64},
        {"torch.complex128", kComplex, 128},
    };
    PyObject* dtype = attribute(object, "dtype");
    PyObject* on_cpu = dtype ? attribute(object, "is_cpu") : nullptr;
    PyObject* layout = on_cpu ? attribute(object, "layout") : nullptr;
    PyObject* name = layout ? PyObject_Str(dtype) : nullptr;
    PyObject* of_layout = name ? PyObject_Str(layout) : nullptr;
    bool known = false;
    if (of_layout && on_cpu == Py_True &&
        !PyUnicode_CompareWithASCIIString(of_layout, "torch.strided")) {
        for (const auto& candidate : kDtypes) {
            if (!PyUnicode_CompareWithASCIIString(name, candidate.name)) {
                known = set_dtype(candidate.code, candidate.bits, view);
            }
        }
    }
    for (PyObject* each : {dtype, on_cpu, layout, name, of_layout}) Py_XDECREF(each);
    if (!known) return PyErr_Occurred() ? Result::kError : Result::kUnfit;
    bool error = false;
    if (is_true(object, "is_conj", &error)) return Result::kUnfit;
    if (error) return Result::kError;

    dims_.emplace_back();
    std::vector<int64_t>& dims = dims_.back();
    PyObject* shape = attribute(object, "shape");
    PyObject* strides = shape ? called(object, "stride") : nullptr;
    PyObject* address = strides ? called(object, "data_ptr") : nullptr;
    const bool read =
        address && read_integers(shape, &dims) && read_integers(strides, &dims);
    if (read) {
        view->data = reinterpret_cast<char*>(PyLong_AsUnsignedLongLong(address));
        view->ndim = int(dims.size() / 2);
        view->shape = dims.data();
        view->strides = dims.data() + view->ndim;
    }
    for (PyObject* each : {shape, strides, address}) Py_XDECREF(each);
    return read && !PyErr_Occurred() ? Result::kRead : Result::kError;
}

}  // namespace adamax
