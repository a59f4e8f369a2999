// A call of a handler by XLA, with its buffers as views.
#pragma once

#include <initializer_list>
#include <new>
#include <stdexcept>
#include <vector>

#include "threads.hpp"
#include "view.hpp"
#include "xla_ffi.hpp"

namespace adamax::xla {

constexpr int64_t kMostThreads = 256;

// Programs of JAX fit their handlers; others may not.
inline void require(bool fits) {
    if (!fits) throw std::invalid_argument("adamax: a call with operands that do not fit");
}

template <class Arguments>
Arguments prepared(size_t size) {
    Arguments arguments{};
    arguments.size = size;  // without padding, as XLA has it
    return arguments;
}

class Call {
  public:
    // Results lie where the arguments of the same number do, if they are `in_place`.
    Call(const CallFrame& frame, size_t arguments, size_t results, bool in_place)
        : frame_(frame),
          arguments_(views(frame.arguments)),
          results_(views(frame.results)) {
        require(arguments_.size() == arguments && results_.size() == results);
        for (size_t i = 0; in_place && i < results; ++i) {
            require(results_[i].data == arguments_[i].data);
        }
    }

    const View& operator[](size_t i) const { return arguments_[i]; }
    const View& result(size_t i) const { return results_[i]; }

    // The numbers of an argument of a dtype and shape.
    template <class T>
    T* numbers(size_t i, Dtype dtype, std::initializer_list<int64_t> shape) const {
        const View& view = arguments_[i];
        require(view.dtype == dtype && view.ndim == int(shape.size()) &&
                std::equal(shape.begin(), shape.end(), view.shape));
        return reinterpret_cast<T*>(view.data);
    }

    // As many as XLA may use; one where it has no pool of threads.
    int threads() const {
        int64_t count = 1;
        auto ask = prepared<NumThreads>(offsetof(NumThreads, count) + sizeof(int64_t*));
        ask.context = frame_.context;
        ask.count = &count;
        if (Error* error = frame_.api->num_threads(&ask)) {
            auto destroy = prepared<DestroyError>(sizeof(DestroyError));
            destroy.error = error;
            frame_.api->destroy_error(&destroy);
            return 1;
        }
        return int(std::min(std::max<int64_t>(count, 1), kMostThreads));
    }

  private:
    static std::vector<View> views(const Operands& operands) {
        std::vector<View> views(static_cast<size_t>(operands.count));
        for (size_t i = 0; i < views.size(); ++i) {
            require(operands.types[i] == kBuffer);
            views[i] = view_of(*static_cast<const Buffer*>(operands.operands[i]));
        }
        return views;
    }

    static View view_of(const Buffer& buffer) {
        static const int64_t one = 1;
        View view;
        view.data = static_cast<char*>(buffer.data);
        view.shape = buffer.dims;
        view.strides = &one;  // of one dimension, where it is looked at
        view.ndim = int(buffer.rank);
        switch (buffer.dtype) {
            case DataType::kFloat16: view.dtype = Dtype::kFloat16; break;
            case DataType::kBFloat16: view.dtype = Dtype::kBFloat16; break;
            case DataType::kFloat32: view.dtype = Dtype::kFloat32; break;
            case DataType::kFloat64: view.dtype = Dtype::kFloat64; break;
            case DataType::kInt32: view.dtype = Dtype::kInt32; break;
            case DataType::kUInt32: view.dtype = Dtype::kUInt32; break;
            case DataType::kInt8: view.dtype = Dtype::kInt8; break;
            case DataType::kUInt8: view.dtype = Dtype::kUInt8; break;
            default: require(false);
        }
        view.unit = itemsize(view.dtype);
        return view;
    }

    const CallFrame& frame_;
    std::vector<View> arguments_, results_;
};

inline bool answer_metadata(const CallFrame& frame) {
    if (!frame.extension || frame.extension->type != kMetadata) return false;
    Metadata& metadata = *reinterpret_cast<MetadataExtension*>(frame.extension)->metadata;
    metadata.version.major = kMajorVersion;
    metadata.version.minor = kMinorVersion;
    metadata.traits = 0;
    return true;
}

inline Error* failed(const CallFrame& frame, ErrorCode code, const char* message) {
    auto create = prepared<CreateError>(offsetof(CreateError, code) + sizeof(ErrorCode));
    create.message = message;
    create.code = code;
    return frame.api->create_error(&create);
}

// The handler of a verb. No exception leaves it.
template <void (*kVerb)(const Call&), size_t kArguments, size_t kResults, bool kInPlace>
Error* handle(CallFrame* frame) {
    if (answer_metadata(*frame)) return nullptr;
    try {
        const FloatingPointState state;
        kVerb(Call(*frame, kArguments, kResults, kInPlace));
        return nullptr;
    } catch (const std::invalid_argument& error) {
        return failed(*frame, ErrorCode::kInvalidArgument, error.what());
    } catch (const std::bad_alloc&) {
        return failed(*frame, ErrorCode::kResourceExhausted, "adamax: out of memory");
    } catch (const std::exception& error) {
        return failed(*frame, ErrorCode::kInternal, error.what());
    }
}

}  // namespace adamax::xla
