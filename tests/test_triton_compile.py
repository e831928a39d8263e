"""Every Triton kernel, compiled for every GPU generation: no spills, 16-byte accesses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compile_gate
from fusedres import triton_kernels

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton_kernels.missing() is not None, reason=str(triton_kernels.missing())),
]


@pytest.fixture(scope="module")
def printed() -> subprocess.CompletedProcess:
    """The gate in a process of its own: in this one the kernels may be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = sys.executable, compile_gate.__file__
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_no_kernel_fails_the_gate(printed):
    assert printed.returncode == 0, printed.stdout[-4000:] + printed.stderr[-4000:]
    assert printed.stdout.splitlines()[-1].endswith(" 0 failures")


def test_every_kernel_is_compiled_for_every_architecture(printed):
    sources = "\n".join(p.read_text() for p in (ROOT / "kernels").glob("*.py"))
    kernels = set(re.findall(r"^def (\w+)_kernel\(", sources, re.M))
    rows = re.findall(r"^ *(\w+) +(bf16|fp16) +(80|90|100|120) ", printed.stdout, re.M)
    found = {(name, int(arch)) for name, _, arch in rows}
    assert found == {(name, arch) for name in kernels for arch in compile_gate.ARCHS}


# --- what it would say of machine code that is not as it should be


def found(loads: dict[str, int], stores: dict[str, int], stack: int = 0) -> compile_gate.Found:
    """stream_fwd_apply on a tile of 4096 elements by four warps: 4 accesses a tensor."""
    signature = {"x_ptr": "*bf16", "residual_ptr": "*bf16", "y_ptr": "*bf16", "mean_ptr": "*fp32"}
    flags = {"NHWC": True, "BLOCK_C": 64, "BLOCK_HW": 64}
    job = compile_gate.Job(
        "fusedres.kernels.stream", "stream_fwd_apply_kernel", "bf16", 90, (("num_warps", 4),),
        tuple(signature.items()), tuple(flags.items()), (),
    )  # fmt: skip
    counts = compile_gate.Counter(
        {f"LDG.E.{w}".removesuffix(".32"): n for w, n in loads.items()}
        | {f"STG.E.{w}".removesuffix(".32"): n for w, n in stores.items()}
    )
    return compile_gate.Found(job, 64, stack, counts=counts)


@pytest.mark.parametrize("loads,stores,stack,message", [
    ({"128": 10}, {"128": 4, "U8": 4}, 0, None),
    ({"128": 10, "U16": 2}, {"128": 4}, 0, "2 global loads of width U16"),
    ({"128": 10, "64": 1}, {"128": 4}, 0, "1 global loads of width 64"),
    ({"128": 10, "32": 1}, {"128": 4}, 0, "1 global loads of width 32"),
    ({"128": 7}, {"128": 4}, 0, "7 loads of 16 bytes for 2 tensors"),
    ({"128": 10}, {"64": 8}, 0, "0 stores of 16 bytes for 1 tensors"),
    ({"128": 10}, {"128": 4}, 8, "spills: 8 bytes of stack"),
])  # fmt: skip
def test_what_the_gate_refuses(loads, stores, stack, message):
    messages = list(compile_gate.failures(found(loads, stores, stack)))
    if message is None:
        assert messages == []
    else:
        assert len(messages) == 1 and message in messages[0]


@pytest.mark.parametrize("arch,counts,refused", [
    (120, {"STL.64": 2, "UTMALDG.2D": 2}, False),
    (120, {"STL.64": 2, "UTMALDG.2D": 2, "LDL.64": 1}, True),
    (120, {"STL.64": 2}, True),
    (90, {"STL.64": 2, "UTMALDG.2D": 2}, True),
])  # fmt: skip
def test_the_arguments_of_guards_of_tensor_copies_are_no_spills(arch, counts, refused):
    job = compile_gate.Job("", "conv_kernel", "bf16", arch, (("num_warps", 8),), (), (), ())
    messages = list(compile_gate.failures(compile_gate.Found(job, stack=8, counts=counts)))
    assert bool(messages) == refused and all("spills: 8 bytes" in m for m in messages)


@pytest.mark.parametrize("counts,refused", [
    ({"MEMBAR.ALL.GPU": 1, "REDG.E.ADD.STRONG.GPU": 1, "LDG.E.STRONG.GPU": 1}, False),
    ({"MEMBAR.ALL.GPU": 1, "ATOMG.E.ADD.STRONG.GPU": 2}, False),
    ({"REDG.E.ADD.STRONG.GPU": 1, "LDG.E.STRONG.GPU": 1}, True),
    ({"MEMBAR.ALL.GPU": 1, "REDG.E.ADD.STRONG.GPU": 1, "LDG.E": 1}, True),
])  # fmt: skip
def test_programs_that_meet_count_themselves_and_wait(counts, refused):
    signature = (("arrived_ptr", "*i32"),)
    job = compile_gate.Job("", "grid_kernel", "bf16", 90, (("num_warps", 8),), signature, (), ())
    messages = list(compile_gate.failures(compile_gate.Found(job, counts=counts)))
    assert bool(messages) == refused and all("wait for no others" in m for m in messages)
