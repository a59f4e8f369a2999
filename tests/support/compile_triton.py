"""Compiles what steps on a GPU would launch, without a GPU.

The package takes its steps on tensors of the CPU as if they were on a GPU. Each launch is
compiled for its arguments, as Triton would, instead of being run.

    python tests/support/compile_triton.py FOLDER 80 90    # for two compute capabilities

writes assembly and machine code into FOLDER, and a list of them in JSON.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from torch_cases import rows_of, torch
from torch_on_host import Host

from adamax.torch import Adamax, device  # isort: skip

_OPTIONS = ("num_warps", "debug", "sanitize_overflow")
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


class Launches:
    """What would have been launched: sources and options, each once."""

    def __init__(self):
        self.sources = {}

    def record(self, kernel, *args, grid, warmup, **keywords):
        options = {name: keywords.pop(name) for name in _OPTIONS if name in keywords}
        given = dict(zip(kernel.arg_names, args, strict=False)) | keywords
        assert given.keys() == set(kernel.arg_names)
        signature, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            special = not parameter.do_not_specialize
            is_one = isinstance(value, int) and value == 1
            if parameter.is_constexpr or value is None or (special and is_one):
                signature[parameter.name] = "constexpr"
                constants[(position,)] = value
                continue
            signature[parameter.name] = _type_of(value)
            divisible = value if isinstance(value, int) else value.data_ptr()
            if special and divisible % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        self.sources.setdefault(source.hash(), (source, options))


def _type_of(value):
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def launches():
    """Those of steps on every dtype that use everything, and of a plain one."""
    recorded = Launches()
    # A plain function, that becomes a method.
    JITFunction.run = lambda kernel, *args, **keywords: recorded.record(
        kernel, *args, **keywords
    )
    device.DEVICE = Host()
    everything = {
        "weight_decay": 0.1,
        "decoupled_weight_decay": False,
        "lr": torch.tensor(0.1),
        "maximize": True,
    }
    scaled = {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)}
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        take_step(dtype, everything, scaled)
    take_step(torch.float32)
    for dtype in (torch.float32, torch.float64):
        take_exact_steps(dtype)
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("bfloat16", "8bit"):
            compact = {"state_dtype": kind, "stochastic_rounding": True}
            take_step(dtype, everything | compact, scaled)
            take_exact_steps(dtype, compact)
    take_exact_steps(torch.float32, {"state_dtype": "8bit"}, width=512)
    return list(recorded.sources.values())


def take_step(dtype, options=(), attributes=()):
    dense = torch.zeros(5000, dtype=dtype, requires_grad=True)
    table = torch.zeros((1000, 128), dtype=dtype, requires_grad=True)
    dense.grad = torch.zeros_like(dense)
    ids, values = torch.zeros(300, dtype=torch.int64), torch.zeros(300, 128, dtype=dtype)
    table.grad = rows_of(values, ids, table.shape)
    optimizer = Adamax([dense, table], **dict(options))
    vars(optimizer).update(attributes)
    optimizer.step()


def take_exact_steps(dtype, options=(), width=128):
    table = torch.zeros((1000, width), dtype=dtype, requires_grad=True)
    ids, values = torch.zeros(300, dtype=torch.int64), torch.zeros(300, width, dtype=dtype)
    optimizer = Adamax([table], sparse="exact", **dict(options))
    for _ in range(2):
        optimizer.catch_up(table, ids)
        table.grad = rows_of(values, ids, table.shape)
        optimizer.step()
    optimizer.flush()


def compiled(source, options, capability, path):
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options=options)
    path.with_suffix(".cubin").write_bytes(kernel.asm["cubin"])
    path.with_suffix(".ptx").write_text(kernel.asm["ptx"])
    names = source.fn.arg_names
    return {
        "kernel": source.fn.__name__,
        "capability": capability,
        "signature": {
            **source.signature,
            **{names[i]: str(value) for (i,), value in source.constants.items()},
        },
        "ptx": kernel.asm["ptx"],
        **_resources(path.with_suffix(".cubin")),
    }


def _resources(cubin):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(cubin)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown)
    return {name.lower(): int(number) for name, number in pairs}


def main(folder, *capabilities):
    folder, sources = Path(folder), launches()
    made = [
        compiled(source, options, int(capability), folder / f"{number}-sm_{capability}")
        for capability in capabilities
        for number, (source, options) in enumerate(sources)
    ]
    (folder / "compiled.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
