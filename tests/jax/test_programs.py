"""Programs that are saved and run elsewhere, and the handlers of XLA that they call."""

import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from compare import assert_same_bits
from jax_cases import jax, jnp, optax

import adamax  # isort: skip
from adamax.jax import IndexedSlices  # isort: skip  (not without jax)

SOURCE = Path(adamax.__file__).parent

# A step on a table, in the process that saves it and in the one that runs it.
PROGRAM = """
    import pickle, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    from jax import export
    from jax.experimental import serialize_executable
    from adamax.jax import IndexedSlices, adamax

    for kind in (optax.ScaleByAdamState, optax.ScaleByScheduleState):
        export.register_namedtuple_serialization(kind, serialized_name=kind.__name__)
    path, sparse, kind = sys.argv[1:]
    params = {"t": jnp.arange(150.0).reshape(50, 3), "w": jnp.ones(4)}
    kinds = {"t": sparse, "w": "lazy"}
    rate = optax.linear_schedule(0.1, 0.0, 10)
    optimizer = adamax(rate, weight_decay=0.1, sparse=kinds, state_dtype=kind)
    state = optimizer.init(params)
    g = {
        "t": IndexedSlices(jnp.ones((3, 3)), jnp.array([7, 7, -1]), current=True),
        "w": jnp.ones(4),
    }
"""
SAVE = """
    step = jax.jit(optimizer.step)
    with open(path, "wb") as file:
        exported = export.export(step)(params, state, g)
        compiled = step.lower(params, state, g).compile()
        executable = serialize_executable.serialize(compiled)
        result = [np.asarray(leaf) for leaf in jax.tree.leaves(step(params, state, g))]
        pickle.dump((bytes(exported.serialize()), executable, result), file)
    platforms = "cpu", "cuda", "tpu"
    exported = export.export(step, platforms=platforms)(params, state, g)
    print("adamax" in exported.mlir_module(), exported.platforms)
"""
RUN = """
    with open(path, "rb") as file:
        exported, executable, expected = pickle.load(file)
    exported = export.deserialize(bytearray(exported))
    for run in (exported.call, serialize_executable.deserialize_and_load(*executable)):
        result = run(params, state, g)
        for ours, theirs in zip(jax.tree.leaves(result), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    print(exported.platforms, jax.tree.structure(result[1]) == jax.tree.structure(state))
"""


@pytest.mark.parametrize("sparse", ["lazy", "exact"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "8bit"])
def test_a_saved_program_runs_in_a_new_process(run_python, tmp_path, sparse, kind):
    """There nothing of this package has been lowered."""
    arguments = tmp_path / "program", sparse, kind
    assert run_python(PROGRAM + SAVE, *arguments) == "True ('cpu', 'cuda', 'tpu')"
    assert run_python(PROGRAM + RUN, *arguments) == "('cpu',) True"


def test_without_the_private_list_exports_ask_for_the_checks_to_be_disabled(run_python):
    program = """
        import jax, jax.numpy as jnp
        from jax import export
        from jax._src.export import _export
        stable = _export._CUSTOM_CALL_TARGETS_GUARANTEED_STABLE
        del _export._CUSTOM_CALL_TARGETS_GUARANTEED_STABLE
        from adamax.jax import adamax
        _export._CUSTOM_CALL_TARGETS_GUARANTEED_STABLE = stable
        optimizer, w = adamax(0.1), jnp.ones(3)
        step, state = jax.jit(optimizer.step), optimizer.init(w)
        try:
            export.export(step)(w, state, w)
        except ValueError as error:
            print("adamax_dense" in str(error))
        check = export.DisabledSafetyCheck.custom_call("adamax_dense")
        exported = export.export(step, disabled_checks=[check])(w, state, w)
        print(exported.call(w, state, w)[0])
    """
    assert run_python(program) == "True\n[0.9 0.9 0.9]"


def test_the_package_may_be_in_a_zip_file(run_python, tmp_path):
    """An extension module cannot be loaded from there."""
    archive = tmp_path / "packages.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in SOURCE.rglob("*.py"):
            file.write(path, Path("adamax") / path.relative_to(SOURCE))
    program = """
        import sys, warnings
        # Of an editable installation.
        sys.meta_path = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
        sys.path.insert(0, sys.argv[1])
        import jax, jax.numpy as jnp
        import adamax.jax
        from adamax.jax import IndexedSlices, adamax as make
        print(adamax.jax.__file__.startswith(sys.argv[1]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for sparse in ("lazy", "exact"):
                optimizer, w = make(0.1, sparse=sparse), jnp.ones((3, 1))
                g = IndexedSlices(w, jnp.arange(3), current=True)
                print(jax.jit(optimizer.step)(w, optimizer.init(w), g)[0][:, 0])
        print(len(caught), "native core of adamax was not built" in str(caught[0].message))
    """
    expected = "True\n[0.9 0.9 0.9]\n[0.9 0.9 0.9]\n1 True"
    assert run_python(program, archive) == expected


# --- Handlers -----------------------------------------------------------------------------

CHECK_HEADER = r"""
#include <cstddef>
#include <type_traits>

#include "xla/ffi/api/c_api.h"
#include "xla_ffi.hpp"

using namespace adamax::xla;

#define SAME_SIZE(ours, theirs) static_assert(sizeof(ours) == sizeof(theirs))
#define SAME_MEMBER(ours, our_name, theirs, their_name)                           \
    static_assert(offsetof(ours, our_name) == offsetof(theirs, their_name) &&     \
                  sizeof(ours::our_name) == sizeof(theirs::their_name))
#define SAME_VALUE(ours, theirs) static_assert(int(ours) == int(theirs))

SAME_VALUE(kMajorVersion, XLA_FFI_API_MAJOR);
SAME_VALUE(kMinorVersion, XLA_FFI_API_MINOR);
SAME_VALUE(kMetadata, XLA_FFI_Extension_Metadata);
SAME_VALUE(kBuffer, XLA_FFI_ArgType_BUFFER);
SAME_VALUE(kBuffer, XLA_FFI_RetType_BUFFER);
SAME_VALUE(DataType::kInt8, XLA_FFI_DataType_S8);
SAME_VALUE(DataType::kInt32, XLA_FFI_DataType_S32);
SAME_VALUE(DataType::kUInt8, XLA_FFI_DataType_U8);
SAME_VALUE(DataType::kUInt32, XLA_FFI_DataType_U32);
SAME_VALUE(DataType::kFloat16, XLA_FFI_DataType_F16);
SAME_VALUE(DataType::kFloat32, XLA_FFI_DataType_F32);
SAME_VALUE(DataType::kFloat64, XLA_FFI_DataType_F64);
SAME_VALUE(DataType::kBFloat16, XLA_FFI_DataType_BF16);
SAME_VALUE(ErrorCode::kInvalidArgument, XLA_FFI_Error_Code_INVALID_ARGUMENT);
SAME_VALUE(ErrorCode::kResourceExhausted, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
SAME_VALUE(ErrorCode::kInternal, XLA_FFI_Error_Code_INTERNAL);

SAME_SIZE(Extension, XLA_FFI_Extension_Base);
SAME_MEMBER(Extension, size, XLA_FFI_Extension_Base, struct_size);
SAME_MEMBER(Extension, type, XLA_FFI_Extension_Base, type);
SAME_MEMBER(Extension, next, XLA_FFI_Extension_Base, next);
SAME_SIZE(Version, XLA_FFI_Api_Version);
SAME_MEMBER(Version, major, XLA_FFI_Api_Version, major_version);
SAME_MEMBER(Version, minor, XLA_FFI_Api_Version, minor_version);
SAME_MEMBER(Metadata, version, XLA_FFI_Metadata, api_version);
SAME_MEMBER(Metadata, traits, XLA_FFI_Metadata, traits);
SAME_MEMBER(MetadataExtension, base, XLA_FFI_Metadata_Extension, extension_base);
SAME_MEMBER(MetadataExtension, metadata, XLA_FFI_Metadata_Extension, metadata);
SAME_SIZE(Buffer, XLA_FFI_Buffer);
SAME_MEMBER(Buffer, dtype, XLA_FFI_Buffer, dtype);
SAME_MEMBER(Buffer, data, XLA_FFI_Buffer, data);
SAME_MEMBER(Buffer, rank, XLA_FFI_Buffer, rank);
SAME_MEMBER(Buffer, dims, XLA_FFI_Buffer, dims);
SAME_SIZE(CreateError, XLA_FFI_Error_Create_Args);
SAME_MEMBER(CreateError, message, XLA_FFI_Error_Create_Args, message);
SAME_MEMBER(CreateError, code, XLA_FFI_Error_Create_Args, errc);
SAME_SIZE(DestroyError, XLA_FFI_Error_Destroy_Args);
SAME_MEMBER(DestroyError, error, XLA_FFI_Error_Destroy_Args, error);
SAME_SIZE(NumThreads, XLA_FFI_ThreadPool_NumThreads_Args);
SAME_MEMBER(NumThreads, context, XLA_FFI_ThreadPool_NumThreads_Args, ctx);
SAME_MEMBER(NumThreads, count, XLA_FFI_ThreadPool_NumThreads_Args, num_threads);
SAME_MEMBER(Api, version, XLA_FFI_Api, api_version);
SAME_MEMBER(Api, create_error, XLA_FFI_Api, XLA_FFI_Error_Create);
SAME_MEMBER(Api, destroy_error, XLA_FFI_Api, XLA_FFI_Error_Destroy);
SAME_MEMBER(Api, num_threads, XLA_FFI_Api, XLA_FFI_ThreadPool_NumThreads);
SAME_SIZE(Operands, XLA_FFI_Args);
SAME_MEMBER(Operands, count, XLA_FFI_Args, size);
SAME_MEMBER(Operands, types, XLA_FFI_Args, types);
SAME_MEMBER(Operands, operands, XLA_FFI_Args, args);
SAME_SIZE(Operands, XLA_FFI_Rets);
SAME_MEMBER(Operands, operands, XLA_FFI_Rets, rets);
SAME_MEMBER(CallFrame, extension, XLA_FFI_CallFrame, extension_start);
SAME_MEMBER(CallFrame, api, XLA_FFI_CallFrame, api);
SAME_MEMBER(CallFrame, context, XLA_FFI_CallFrame, ctx);
SAME_MEMBER(CallFrame, stage, XLA_FFI_CallFrame, stage);
SAME_MEMBER(CallFrame, arguments, XLA_FFI_CallFrame, args);
SAME_MEMBER(CallFrame, results, XLA_FFI_CallFrame, rets);
"""


def test_the_interface_is_declared_as_jaxlib_declares_it(tmp_path):
    header = SOURCE / "_native" / "xla_ffi.hpp"
    if not (shutil.which("g++") and header.is_file()):
        pytest.skip("needs g++ and the source of the native core")
    source = tmp_path / "check.cpp"
    source.write_text(CHECK_HEADER, encoding="utf-8")
    flags = ["-std=c++17", "-fsyntax-only", f"-I{header.parent}"]
    theirs = ["-isystem", jax.ffi.include_dir()]
    done = subprocess.run(
        ["g++", *flags, *theirs, source], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def call(target, results, *operands):
    """Call a handler as no program of this package does."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    return jax.jit(jax.ffi.ffi_call(target, shapes))(*operands)


TABLE, SCALARS = np.ones((5, 3), np.float32), np.ones(5, np.float32)
INDICES, ROWS = np.array([1, 2], np.int32), np.ones((2, 3), np.float32)
CODES, LEVELS = np.ones((5, 3), np.int8), np.ones((5, 3), np.uint8)
SIX, RANDOM = np.ones(6, np.float32), np.ones((2, 15), np.uint32)
LEAF = np.ones(1, np.int32)
FRAMES, STATE_8BIT = np.zeros(5, np.float32), [TABLE, CODES, LEVELS]
DENSE = [TABLE, SIX, RANDOM, LEAF]
WRONG_CALLS = {
    "too few operands": ("adamax_dense", [TABLE] * 4),
    "not in place": ("adamax_dense", [TABLE] * 4 + [SCALARS]),
    "a gradient of another shape": ("adamax_dense", [TABLE] * 3 + [ROWS, SCALARS]),
    "integers": ("adamax_dense", [TABLE.astype(np.int32)] * 4 + [SCALARS]),
    "rows not in place": ("adamax_rows", [TABLE] * 3 + [INDICES, ROWS, SCALARS]),
    "booleans": ("adamax_put", [TABLE > 0, INDICES, ROWS > 0]),
    "codes not in place": ("adamax_8bit_dense", [*STATE_8BIT, FRAMES, *DENSE]),
    "8-bit state": ("adamax_dense", [*STATE_8BIT, TABLE, SCALARS]),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_programs_that_do_not_fit_a_handler_are_an_error(name):
    target, operands = WRONG_CALLS[name]
    results = [((5, 3), np.float32)] * (1 if target == "adamax_put" else 3)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT: adamax: a call"
    ):
        call(target, results, *operands)


UNFIT = {
    "few frames": {3: np.zeros(3, np.float32)},
    "frames of another dtype": {3: np.zeros(5, np.int32)},
    "frames with two axes": {3: np.zeros((5, 1), np.float32)},
    "float32 state": {1: TABLE},
    "both signed": {2: CODES},
    "codes of another shape": {1: CODES[:2]},
    "wide parameters": {0: TABLE.astype(np.float64)},
    "a short gradient": {4: ROWS},
    "five scalars": {5: SCALARS},
    "few random numbers": {6: RANDOM[:, :9]},
    "a leaf that is not there": {7: LEAF + 1},
    "a negative leaf": {7: LEAF - 2},
    "signed random numbers": {6: RANDOM.astype(np.int32)},
}


@pytest.mark.parametrize("name", [None, *UNFIT])
def test_8_bit_state_that_does_not_fit_is_an_error(name):
    fits = dict(enumerate([*STATE_8BIT, FRAMES, *DENSE]))
    with jax.enable_x64(True):
        operands = [jnp.asarray(x) for x in {**fits, **UNFIT.get(name, {})}.values()]
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:4]]
        aliases = {number: number for number in range(4)}
        handler = jax.ffi.ffi_call(
            "adamax_8bit_dense", shapes, input_output_aliases=aliases
        )
        if name is None:
            w, *_ = jax.jit(handler)(*operands)
            assert np.isfinite(w).all()
            return
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT: adamax: a call"
        ):
            jax.jit(handler)(*operands)


def test_sums_of_other_shapes_are_an_error():
    operands = INDICES, ROWS, np.array([5], np.int32)
    indices, sums = call("adamax_sum", [((2,), np.int32), ((2, 3), np.float32)], *operands)
    np.testing.assert_array_equal(indices, INDICES)
    np.testing.assert_array_equal(sums, ROWS)
    for results in (
        [((2,), np.float32), ((2, 3), np.float32)],
        [((3,), np.int32), ((2, 3), np.float32)],
        [((2,), np.int32), ((2, 4), np.float32)],
        [((2,), np.int32), ((2, 3), np.float64)],
    ):
        with (
            jax.enable_x64(True),
            pytest.raises(jax.errors.JaxRuntimeError, match="adamax"),
        ):
            call("adamax_sum", results, *operands)


def test_the_source_lists_all_handlers():
    """A saved program may call any of them, so that they stay what they are."""
    from adamax._native import verbs

    source = SOURCE / "_native" / "xla.cpp"
    if not source.is_file():
        pytest.skip("needs the source of the native core")
    listed = re.findall(r"^//   (adamax_\w+) ", source.read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(verbs.xla_handlers())
    assert len(listed) == 19


def test_subnormal_numbers_are_kept_and_the_caller_flushes_them_still():
    """XLA computes with a floating-point state in which they are 0."""
    optimizer = adamax.jax.adamax(0.5, eps=0.0)
    w, tiny = jnp.zeros((2, 1)), jnp.full((2, 1), 1e-41)
    for g in (tiny, IndexedSlices(tiny, jnp.arange(2))):
        after, state = jax.jit(optimizer.step)(w, optimizer.init(w), g)
        np.testing.assert_allclose(after, -0.5, rtol=1e-3)  # mu has few bits
        assert_same_bits(state[0].nu, np.full((2, 1), 1e-41, np.float32))
    assert not (jax.jit(lambda x: x * 1.0)(tiny) * 1e30).any()


def test_as_many_threads_as_xla_has(run_python):
    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs Linux' list of threads")
    program = """
        import os
        import jax, jax.numpy as jnp
        from adamax.jax import adamax
        optimizer, w = adamax(0.1), jnp.ones(4 << 20)
        state = optimizer.init(w)
        step = jax.jit(optimizer.step).lower(w, state, w).compile()
        jax.block_until_ready((w + 1, state))
        before = len(os.listdir("/proc/self/task"))
        jax.block_until_ready(step(w, state, w))
        print(len(os.listdir("/proc/self/task")) - before)
    """
    for threads in (1, 2, 3):
        assert run_python(program, NPROC=str(threads)) == str(threads - 1)


def test_optax_is_needed_for_the_optimizer_alone(run_python):
    """Keras, on JAX, does without."""
    program = """
        import sys
        sys.modules["optax"] = None
        import adamax.jax, adamax.jax.rule
        print(adamax.jax.lookup.__name__, adamax.jax.IndexedSlices.__name__)
        try:
            adamax.jax.adamax
        except ModuleNotFoundError as error:
            print("optax" in str(error))
    """
    assert run_python(program) == "lookup IndexedSlices\nTrue"


def test_public_names_are_those_that_are_listed():
    assert sorted(adamax.jax.__all__) == [
        "Adamax", "CompactState", "IndexedSlices", "adamax", "apply_updates",
        "convert_state", "global_norm", "lookup", "on_rows", "psum", "scale_by_adamax",
        "sum_repeats", "value_and_sparse_grad",
    ]  # fmt: skip
    assert all(hasattr(adamax.jax, name) for name in adamax.jax.__all__)
    assert set(adamax.jax.__all__) <= set(dir(adamax.jax))
    with pytest.raises(AttributeError, match=r"adamax\.jax' has no attribute 'adamaxx'"):
        adamax.jax.adamaxx  # noqa: B018
    assert isinstance(adamax.jax.adamax(0.1), optax.GradientTransformationExtraArgs)
