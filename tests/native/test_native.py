"""The native core as a build: its symbols, its vector code, its threads, its interface."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from verbs import NATIVE

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "adamax" / "_native"

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not NATIVE,
    reason="needs g++, and the native core",
)


def run(*command):
    finished = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


# --- Threads ------------------------------------------------------------------------------


@pytest.mark.parametrize("sanitizer", ["none", "thread", "address,undefined"])
def test_the_pool_of_threads(tmp_path, sanitizer):
    program = tmp_path / "pool_test"
    options = [] if sanitizer == "none" else [f"-fsanitize={sanitizer}"]
    run(
        *("g++", "-std=c++17", "-O1", "-g", "-pthread", *options, f"-I{SOURCES}"),
        *(Path(__file__).with_name("pool_test.cpp"), SOURCES / "threads.cpp"),
        *("-o", program),
    )
    # Their own locks do not survive a fork beside threads.
    arguments = [] if sanitizer == "none" else ["without", "forks"]
    assert run(program, *arguments) == "ok\n"


# --- Instruction sets ---------------------------------------------------------------------

FLAGS = ["-O3", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off", "-fPIC"]
X86_64 = {
    "base": [],
    "avx2": ["-mavx2"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The loops, compiled for each instruction set with the flags of CMakeLists.txt."""
    if not run("g++", "-dumpmachine").startswith("x86_64"):
        pytest.skip("for x86-64")
    folder = tmp_path_factory.mktemp("objects")
    made = {}
    for isa, flags in X86_64.items():
        made[isa] = folder / f"{isa}.o"
        run(
            *("g++", "-std=c++17", "-DADAMAX_X86_64", *FLAGS, *flags, "-c"),
            *(SOURCES / f"kernels_{isa}.cpp", "-o", made[isa]),
        )
    return made


def test_the_flags_are_those_of_the_build():
    text = (ROOT / "CMakeLists.txt").read_text()
    for flag in [*FLAGS[:-1], *X86_64["avx2"], *X86_64["avx512"]]:
        assert flag in text


def test_no_symbol_of_one_instruction_set_can_be_taken_for_anothers(objects):
    """The linker keeps one of several weak symbols of a name, whatever it was made for."""
    for isa, path in objects.items():
        for line in run("nm", "-C", path).splitlines():
            kind, name = line[17:].split(" ", 1)
            if kind in "WVu":
                assert f"adamax::{isa}::" in name, name


@pytest.mark.parametrize(("isa", "register"), [("avx2", "ymm"), ("avx512", "zmm")])
def test_the_rule_is_vectorised(objects, isa, register):
    """Division as well, which GCC does only where it may compute quotients nobody wants."""
    code = run("objdump", "-d", "-C", "--no-show-raw-insn", objects[isa])
    for function in ("update<float>", "update<double>", "catch_up_runs<float>"):
        body = code.split(f"adamax::{isa}::{function}", 1)[1].split("\n\n", 1)[0]
        width = "vdivps" if "float" in function else "vdivpd"
        assert re.search(rf"{width} .*%{register}", body), function
        assert "vfmadd" not in body


# --- DLPack -------------------------------------------------------------------------------


def test_the_layout_of_dlpack_is_that_of_torch(torch, tmp_path):
    """Where torch has the header, this core's own declarations are compared with it."""
    include = Path(torch.__file__).parent / "include"
    if not (include / "ATen" / "dlpack.h").exists():
        pytest.fail("torch ships no dlpack.h")
    source = tmp_path / "layout.cpp"
    source.write_text(
        """
        #include <ATen/dlpack.h>
        #include <cstddef>
        static_assert(sizeof(DLTensor) == 48);
        static_assert(offsetof(DLTensor, device) == 8);
        static_assert(offsetof(DLTensor, ndim) == 16);
        static_assert(offsetof(DLTensor, dtype) == 20);
        static_assert(offsetof(DLTensor, shape) == 24);
        static_assert(offsetof(DLTensor, strides) == 32);
        static_assert(offsetof(DLTensor, byte_offset) == 40);
        static_assert(offsetof(DLPackExchangeAPI, header.version) == 0);
        static_assert(offsetof(DLPackExchangeAPI, header.prev_api) == 8);
        static_assert(offsetof(DLPackExchangeAPI, dltensor_from_py_object_no_sync) == 40);
        static_assert(kDLCPU == 1 && kDLInt == 0 && kDLFloat == 2);
        static_assert(kDLBfloat == 4 && kDLComplex == 5);
        """
    )
    run("g++", "-std=c++17", "-fsyntax-only", f"-I{include}", source)
