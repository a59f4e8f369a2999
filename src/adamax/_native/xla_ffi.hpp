// The part of XLA's foreign-function interface that the handlers in xla.cpp use.
//
// The layout is that of version 0.3, in the file xla/ffi/api/c_api.h that jaxlib ships. It
// is declared anew, so that the package can be built without jaxlib;
// tests/jax/test_ffi_header.py compares the two. A structure's size is that of the members
// that its version has.
#pragma once

#include <cstddef>
#include <cstdint>

namespace adamax::xla {

constexpr int kMajorVersion = 0;
constexpr int kMinorVersion = 3;

struct Extension {
    size_t size;
    int32_t type;
    Extension* next;
};

struct Version {
    size_t size;
    Extension* extension;
    int32_t major, minor;
};

// With this extension a call is not one, but asks what the handler was written for.
constexpr int32_t kMetadata = 1;

struct Metadata {
    size_t size;
    Version version;
    uint32_t traits;
    int64_t state_type;
};

struct MetadataExtension {
    Extension base;
    Metadata* metadata;
};

enum class DataType : int32_t {
    kInt8 = 2,
    kInt32 = 4,
    kInt64 = 5,
    kUInt8 = 6,
    kUInt32 = 8,
    kUInt64 = 9,
    kFloat16 = 10,
    kFloat32 = 11,
    kFloat64 = 12,
    kComplex64 = 15,
    kBFloat16 = 16,
    kComplex128 = 18,
};

struct Buffer {
    size_t size;
    Extension* extension;
    DataType dtype;
    void* data;
    int64_t rank;
    int64_t* dims;
};

struct Error;
struct Context;

enum class ErrorCode : int32_t {
    kInvalidArgument = 3,
    kResourceExhausted = 8,
    kInternal = 13
};

struct CreateError {
    size_t size;
    Extension* extension;
    const char* message;
    ErrorCode code;
};

struct DestroyError {
    size_t size;
    Extension* extension;
    Error* error;
};

struct NumThreads {
    size_t size;
    Extension* extension;
    Context* context;
    int64_t* count;  // is written
};

struct Api {
    size_t size;
    Extension* extension;
    Version version;
    const void* internal;
    Error* (*create_error)(CreateError*);
    void* get_message;
    void (*destroy_error)(DestroyError*);
    void* unused[9];
    Error* (*num_threads)(NumThreads*);
};

// The arguments or the results of a call.
constexpr int32_t kBuffer = 1;  // the type of one that is a buffer

struct Operands {
    size_t size;
    Extension* extension;
    int64_t count;
    int32_t* types;
    void** operands;
};

struct CallFrame {
    size_t size;
    Extension* extension;
    const Api* api;
    Context* context;
    int32_t stage;
    Operands arguments;
    Operands results;
    // Attributes, and a future for asynchronous results, follow.
};

// Null for success. XLA destroys the error.
using Handler = Error*(CallFrame*);

}  // namespace adamax::xla
