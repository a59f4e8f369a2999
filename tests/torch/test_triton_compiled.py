"""The Triton kernels, compiled for GPUs on a machine that has none.

What the interpreter cannot tell: that types fit, and what the machine code is like.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from frameworks import framework

CAPABILITIES = (80, 90)


# All in one worker, which compiles the kernels once.
pytestmark = pytest.mark.xdist_group("compiled by Triton")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What ``compile_triton.py`` tells of each kernel, by name and what it stores."""
    framework("torch")
    framework("triton")
    folder = tmp_path_factory.mktemp("compiled")
    environment = {
        **os.environ,
        "PYTHONWARNINGS": "error",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_INTERPRET": "0",
    }
    script = Path(__file__).parents[1] / "support" / "compile_triton.py"
    command = [sys.executable, script, folder, *map(str, CAPABILITIES)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "compiled.json").read_text())


def of(compiled, kernel, **signature):
    """The kernels of this name for these types and constants; there must be some."""
    chosen = [
        one
        for one in compiled
        if one["kernel"] == kernel and signature.items() <= one["signature"].items()
    ]
    assert {one["capability"] for one in chosen} == set(CAPABILITIES)
    return chosen


def instructions(one, pattern):
    return re.findall(rf"^\s*(?:@\S+ )?({pattern})\s", one["ptx"], re.MULTILINE)


@pytest.mark.parametrize("stored", ["fp32", "fp64", "fp16", "bf16"])
def test_kernels_compile_for_every_dtype(compiled, stored):
    of(compiled, "_dense_step", STORED=stored)
    of(compiled, "_rows_step", w=f"*{stored}")


@pytest.mark.parametrize("stored", ["fp32", "fp64"])
def test_kernels_for_exact_mode_compile(compiled, stored):
    of(compiled, "_catch_up", NUMBER=stored)
    of(compiled, "_catch_up", NUMBER=stored, ids="None")


def test_a_row_is_stamped_after_all_warps_have_read_its_stamp(compiled):
    for one in of(compiled, "_catch_up", BLOCK="512"):
        stores = list(re.finditer(r"st\.global\.b32", one["ptx"]))
        assert len(instructions(one, r"bar\.sync")) == 1
        # The last two stores: of the stamp and of the frame.
        assert stores[-3].start() < one["ptx"].index("bar.sync") < stores[-2].start()


@pytest.mark.parametrize("kernel", ["_sum_chunks", "_stamp_rows"])
def test_the_other_kernels_compile(compiled, kernel):
    of(compiled, kernel)


def test_counters_of_one_and_of_many_parameters_compile(compiled):
    of(compiled, "_advance", table="None")
    of(compiled, "_advance", counters="None")


def test_registers_are_enough(compiled):
    """Nothing is kept in memory because there is no register for it."""
    for one in compiled:
        # One number, where the random bits of two operands need keys at once.
        most = 8 if one["signature"].get("MOMENT") == "bf16" else 0
        assert one["stack"] <= most, one["kernel"]
        assert one["local"] == 0, one["kernel"]
        assert 0 < one["reg"] <= 128, one["kernel"]


# Of a block, in what one thread takes: 4 numbers of w, m, u and g. That the loop over whole
# blocks reads and writes no less at once is what its speed hangs on.
@pytest.mark.parametrize(
    ("stored", "loads", "stores"),
    [
        ("fp32", {"ld.global.v4.b32": 4}, {"st.global.v4.b32": 3}),
        ("fp64", {"ld.global.v2.b64": 8}, {"st.global.v2.b64": 6}),
        (
            "bf16",
            {"ld.global.v4.b32": 2, "ld.global.v2.b32": 2},
            {"st.global.v4.b32": 2, "st.global.v2.b32": 1},
        ),
        (
            "fp16",
            {"ld.global.v4.b32": 2, "ld.global.v2.b32": 2},
            {"st.global.v4.b32": 2, "st.global.v2.b32": 1},
        ),
    ],
)
def test_dense_steps_move_16_bytes_at_once(compiled, stored, loads, stores):
    number = "fp64" if stored == "fp64" else "fp32"
    for one in of(compiled, "_dense_step", STORED=stored, MOMENT=number):
        for instruction, count in (loads | stores).items():
            found = instructions(one, re.escape(instruction))
            assert len(found) == count, (instruction, one["capability"])


def test_rows_are_moved_16_bytes_at_once(compiled):
    for one in of(compiled, "_rows_step", w="*fp32", m="*fp32"):
        assert len(instructions(one, r"st\.global\.v4\.b32")) == 3
        assert not instructions(one, r"st\.global\.b32")


@pytest.mark.parametrize(
    ("kernel", "stored"),
    [
        ("_dense_step", {"STORED": "fp32", "MOMENT": "fp32"}),
        ("_rows_step", {"w": "*fp32", "m": "*fp32"}),
    ],
)
def test_arithmetic_of_float32_is_that_of_the_cpu(compiled, kernel, stored):
    """The maximum keeps NaN, quotients are exact, subnormal numbers are not zero."""
    for one in of(compiled, kernel, **stored):
        assert instructions(one, r"max\.NaN\.f32")
        assert not instructions(one, r"max\.f32|max\.ftz\S*")
        assert instructions(one, r"div\.rn\.f32")
        assert not instructions(one, r"div\.full\S*|div\.approx\S*|rcp\S*")
        assert ".ftz" not in one["ptx"]


def test_16_bit_parameters_are_rounded_to_nearest(compiled):
    for one in of(compiled, "_dense_step", STORED="bf16", STOCHASTIC="False"):
        assert instructions(one, r"cvt\.rn\.bf16x2\.f32")
        assert not instructions(one, r"cvt\.rz\S*")
    for one in of(compiled, "_dense_step", STORED="fp16"):
        assert instructions(one, r"cvt\.rn\.f16x?2?\.f32")
        assert not instructions(one, r"cvt\.rz\S*")


def test_the_step_size_is_computed_in_float64(compiled):
    for one in of(compiled, "_advance"):
        assert instructions(one, r"div\.rn\.f64")
        assert not instructions(one, r"div\S*\.f32")


def test_indices_out_of_range_stop_the_device(compiled):
    for kernel in ("_rows_step", "_stamp_rows"):
        for one in of(compiled, kernel):
            assert "__assertfail" in one["ptx"]
            assert one["ptx"].count("call.uni") == 1  # nothing else is checked


# --- Compact state ------------------------------------------------------------------------

STORED = pytest.mark.parametrize("stored", ["fp32", "bf16"])
STATE = pytest.mark.parametrize(("moment", "pointer"), [("bf16", "*bf16"), ("int8", "*i8")])


@STORED
@STATE
def test_kernels_for_compact_state_compile(compiled, stored, moment, pointer):
    is_16_bit = str(stored == "bf16")
    of(compiled, "_dense_step", STORED=stored, MOMENT=moment, STOCHASTIC=is_16_bit)
    of(compiled, "_rows_step", w=f"*{stored}", m=pointer, STOCHASTIC=is_16_bit)
    of(compiled, "_catch_up", w=f"*{stored}", m=pointer, STOCHASTIC=is_16_bit)


def test_frames_of_one_and_of_many_parameters_compile(compiled):
    of(compiled, "_advance", places="*i64")
    of(compiled, "_advance_frames")


def test_codes_are_moved_4_at_once(compiled):
    """In whole blocks: what is left for the others are words of one number."""
    for one in of(compiled, "_dense_step", STORED="bf16", MOMENT="int8"):
        assert len(instructions(one, r"st\.global\.b32")) == 2
        assert len(instructions(one, r"st\.global\.v2\.b32")) == 1
    for one in of(compiled, "_dense_step", STORED="bf16", MOMENT="bf16"):
        assert len(instructions(one, r"st\.global\.v2\.b32")) == 3


@STATE
def test_arithmetic_on_compact_state_is_that_of_float32(compiled, moment, pointer):
    chosen = (
        *of(compiled, "_dense_step", MOMENT=moment),
        *of(compiled, "_rows_step", m=pointer),
    )
    for one in chosen:
        assert instructions(one, r"max\.NaN\.f32")
        assert instructions(one, r"div\.rn\.f32")
        assert not instructions(one, r"div\.full\S*|div\.approx\S*|rcp\S*")
        assert ".ftz" not in one["ptx"]


def test_nothing_is_rounded_to_nearest_that_random_bits_round(compiled):
    for one in of(compiled, "_dense_step", STOCHASTIC="True"):
        assert not instructions(one, r"cvt\.rn\.bf16\S*")
