"""What the compile gate of the CUDA kernels says of machine code that is not as it should be.

test_packaging.py lets it read the wheel that is built there; `make gate` compiles for every GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

import cuda_gate
from cuda_gate import Counter, Found, failures, kernels_in

APPLY = "stream_bwd_apply_kernel"  # dy, x and residual in, dx and dresidual out


def found(loads: dict, stores: dict, kernel=APPLY, arguments=("__half", "false", "true", "false")):
    counts = Counter({f"LDG.E.{w}".removesuffix(".32"): n for w, n in loads.items()})
    counts |= Counter({f"STG.E.{w}".removesuffix(".32"): n for w, n in stores.items()})
    return Found(kernel, tuple(arguments), "90a", 64, 0, 0, 0, counts)


@pytest.mark.parametrize("loads,stores,message", [
    ({"128": 9, "32": 48, "U8": 3}, {"128": 6}, None),
    ({"128": 2, "32": 48}, {"128": 2}, "2 loads of 16 bytes for 3 tensors"),
    ({"128": 3, "U16": 8}, {"128": 2}, "loads of less than 16 bytes: {'U16': 8}"),
    ({"128": 3, "64": 2}, {"128": 2}, "loads of less than 16 bytes: {'64': 2}"),
    ({"128": 3}, {"128": 1}, "1 stores of 16 bytes for 2 tensors"),
    ({"128": 3}, {"128": 2, "32": 4}, "stores of four bytes beside the 0 numbers"),
    ({"128": 3}, {"128": 2, "U16": 8}, "stores of less than 16 bytes: {'U16': 8}"),
])  # fmt: skip
def test_what_it_refuses_of_a_streaming_kernel(loads, stores, message):
    messages = list(failures(found(loads, stores)))
    assert messages == [] if message is None else message in "; ".join(messages)


def test_float32_takes_two_accesses_a_pack():
    arguments = "float", "false", "true", "false"
    assert list(failures(found({"128": 6}, {"128": 4}, arguments=arguments))) == []
    messages = list(failures(found({"128": 7}, {"128": 5}, arguments=arguments)))
    assert len(messages) == 2


def test_accesses_are_of_global_memory():
    """nvcc made generic loads of residuals for sm_120, which count as no load of 16 bytes here."""
    known = found({"128": 3}, {"128": 2})
    known.counts["LD.E.128"] = 4
    assert list(failures(known)) == ["4 accesses of 16 bytes that could be of any memory"]


def test_hoppers_warpgroups_share_registers_that_are_there():
    counts = Counter({"HGMMA.64x64x16.F32": 4, "UTMALDG.2D": 1, "USETMAXREG.DEALLOC": 1})
    counts["STG.E.128"] = 4
    kernel = Found("conv_sm90_kernel", ("__half", "64"), "90a", 168, 0, 0, 0, counts)
    assert list(failures(kernel)) == []
    (message,) = failures(replace(kernel, registers=160))
    assert message == "160 registers a thread to share out, wanted 168"


@pytest.mark.parametrize("copies,messages", [
    ({"128": 2}, 0), ({"128": 1}, 1), ({}, 1), ({"128": 2, "64": 1}, 1),
])  # fmt: skip
def test_a_tile_comes_by_whole_copies(copies, messages):
    counts = Counter({"LDG.E.128": 2, "STG.E.128": 4})
    counts |= Counter({f"LDGSTS.E.BYPASS.{width}": n for width, n in copies.items()})
    arguments = "float", "false"
    tile = Found("se_bwd_cluster_kernel", arguments, "90a", 64, 0, 0, 0, counts)
    assert len(list(failures(tile))) == messages


def test_statistics_are_numbers():
    stats = dict(kernel="stream_stats_kernel", arguments=("float", "true", "true"))
    assert list(failures(found({"128": 2}, {"32": 2}, **stats))) == []
    assert len(list(failures(found({"128": 2}, {"32": 6}, **stats)))) == 1


@pytest.mark.parametrize("kernel,arguments", [
    (APPLY, ("__half", "false", "false", "true")),  # for what is not aligned
    (APPLY, ("double", "false", "false", "true")),
    ("se_linear_kernel", ("float",)),
])  # fmt: skip
def test_others_may_be_narrow(kernel, arguments):
    assert list(failures(found({"U16": 8}, {"U16": 8}, kernel, arguments))) == []


@pytest.mark.parametrize("stack,local,spill", [(8, 0, {}), (0, 16, {}), (0, 0, {"STL.64": 1})])
def test_no_kernel_may_spill(stack, local, spill):
    spilling = Found("se_linear_kernel", ("float",), "80", 64, stack, 0, local, Counter(spill))
    (message,) = failures(spilling)
    assert message.startswith("spills: ")


PRINTED = """
Resource usage:
 Function _ZN1a10add_kernelIfLb1EEEvNS_6ParamsE:
  REG:22 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:10 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN1a10mul_kernelIdEEvNS_6ParamsE:
  REG:40 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:10 TEXTURE:0 SURFACE:0 SAMPLER:0

\t\tFunction : _ZN1a10mul_kernelIdEEvNS_6ParamsE
        /*0000*/                   LDG.E.64 R4, desc[UR4][R2.64] ;   /* 0x1 */
        /*0010*/              @!P0 STL [R1], R4 ;                    /* 0x2 */

\t\tFunction : _ZN1a10add_kernelIfLb1EEEvNS_6ParamsE
        /*0000*/              @!P1 LDG.E.128.CONSTANT R8, [R2.64] ;  /* 0x3 */
        /*0010*/                   STG.E.U8 [R2.64], R8 ;            /* 0x4 */
"""


def test_what_it_reads():
    add, mul = kernels_in(PRINTED, "90a")
    assert (add.kernel, add.arguments, add.registers, add.shared) == (
        "add_kernel", ("float", "true"), 22, 1024,
    )  # fmt: skip
    assert add.widths("LDG") == {"128": 1} and add.widths("STG") == {"U8": 1}
    assert (mul.kernel, mul.arguments, mul.stack) == ("mul_kernel", ("double",), 8)
    assert [message.partition(":")[0] for message in failures(mul)] == ["spills"]


def test_its_rules_are_for_kernels_that_there_are():
    sources = "".join(p.read_text() for p in (cuda_gate.ROOT / "csrc" / "cuda").glob("*.cuh"))
    assert [name for name in cuda_gate.STREAMING if f" {name}(" not in sources] == []
