"""A kernel's machine code, and what it must be like: ``failures`` says what it is not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

TENSOR_CORES = (
    "se_mlp_kernel", "conv_bn_act_fwd_kernel", "conv_stats_fwd_kernel", "conv_grad_kernel",
)  # fmt: skip
# The tensor cores' instructions; small tiles take the warp's own on the newer architectures too.
MMA = {80: ("HMMA",), 90: ("HGMMA", "HMMA"), 100: ("UTC", "HMMA"), 120: ("HMMA",)}
# Bytes of shared memory a block can have (CUDA C++ Programming Guide, compute capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# Kernels that stream activations, and which of their pointers they write activations to.
STREAMING = {
    "bn_stats_kernel": (),
    "bn_act_fwd_whole_kernel": ("y_ptr",),
    "bn_act_bwd_whole_kernel": ("dx_ptr", "dresidual_ptr"),
    "bn_act_fwd_grid_kernel": ("y_ptr",),
    "bn_act_bwd_grid_kernel": ("dx_ptr", "dresidual_ptr"),
    "stream_fwd_apply_kernel": ("y_ptr",),
    "stream_bwd_reduce_kernel": (),
    "stream_bwd_apply_kernel": ("dx_ptr", "dresidual_ptr"),
    "residual_add_fwd_kernel": ("y_ptr",),
    "residual_add_bwd_reduce_kernel": (),
    "residual_add_bwd_apply_kernel": ("dx_ptr", "dshortcut_ptr"),
    "residual_mix_fwd_kernel": ("y_ptr",),
    "residual_mix_bwd_kernel": ("dbranch_ptr", "dshortcut_ptr", "dgate_ptr"),
    "highway_fwd_kernel": ("y_ptr",),
    "highway_bwd_kernel": ("dparts_ptr", "dx_ptr"),
    "lstm_cell_fwd_kernel": ("h_ptr", "c_new_ptr"),
    "lstm_cell_bwd_kernel": ("dgates_ptr", "dc_ptr"),
    "dense_store_kernel": ("y_ptr",),
    "dense_load_kernel": ("h_ptr",),
    "dense_grad_kernel": ("dx_ptr",),
    "dense_finish_kernel": ("dy_ptr",),
}
LOADED = (
    "x_ptr", "dy_ptr", "residual_ptr", "branch_ptr", "shortcut_ptr", "gate_ptr", "parts_ptr",
    "gates_ptr", "c_ptr", "dh_ptr", "dc_new_ptr",
)  # fmt: skip
# Pointers to several tensors of the tile's size, side by side: PARTS of them.
SIDE_BY_SIDE = ("parts_ptr", "dparts_ptr", "gates_ptr", "dgates_ptr")


@dataclass(frozen=True)
class Job:
    """One kernel, as one launch specialises it, for one architecture."""

    module: str
    kernel: str
    dtype: str
    arch: int
    options: tuple[tuple[str, int], ...]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]  # arguments that are multiples of 16

    @property
    def warps(self) -> int:
        return dict(self.options)["num_warps"]

    @property
    def flags(self) -> str:
        """What tells it from the kernel's other launches."""
        return " ".join(_told(name, value) for name, value in self.constants)


def _told(name: str, value: object) -> str:
    if value is None:
        return f"no {name.removesuffix('_ptr')}"
    return value if isinstance(value, str) else f"{name}={value:d}"


@dataclass(frozen=True)
class Found:
    """What the machine code of a job is like."""

    job: Job
    registers: int = 0
    stack: int = 0
    shared: int = 0
    instructions: int = 0
    counts: Counter = field(default_factory=Counter)
    error: str | None = None

    def has(self, *instructions: str) -> bool:
        return any(name.startswith(instructions) for name in self.counts)

    def widths(self, kind: str) -> dict[str, int]:
        """Global loads ("LDG") or stores ("STG") by width: "U8", "U16", "32", "64", "128"."""
        found: Counter = Counter()
        for name, n in self.counts.items():
            if name.startswith(kind + "."):
                width = re.search(r"\.(U8|S8|U16|S16|64|128)\b", name)
                found[width.group(1) if width else "32"] += n
        return dict(found)


def failures(found: Found) -> Iterator[str]:
    if found.error is not None:
        yield found.error
        return
    spills = sum(n for name, n in found.counts.items() if name.startswith(("STL", "LDL")))
    if (found.stack or spills) and not guards_copies(found):
        yield f"spills: {found.stack} bytes of stack, {spills} local loads and stores"
    if found.job.kernel in STREAMING:
        yield from narrow_accesses(found)
    if found.shared > SHARED[found.job.arch]:
        yield f"{found.shared} bytes of shared memory, a block has {SHARED[found.job.arch]}"
    if found.job.kernel in TENSOR_CORES and not found.has(*MMA[found.job.arch]):
        yield f"no tensor-core instruction ({', '.join(MMA[found.job.arch])})"
    if dict(found.job.constants).get("TMA") and not found.has("UTMALDG"):
        yield "no tile is loaded through a tensor descriptor (UTMALDG)"
    if "arrived_ptr" in dict(found.job.signature) and not meets(found):
        yield "programs do not count themselves behind a fence, or wait for no others"


def meets(found: Found) -> bool:
    """Whether programs publish their sums, count themselves, and look at the counter again."""
    waits = any(name.startswith("LDG") and "STRONG.GPU" in name for name in found.counts)
    return found.has("MEMBAR") and found.has("RED", "ATOM") and (waits or found.has("ATOM"))


def guards_copies(found: Found) -> bool:
    """Whether local stores are nothing but arguments of the guards of tensor copies.

    For sm_120 ptxas 12.9 (Triton 3.6) puts a branch before each copy, not taken unless its barrier
    is another block's, to a call with 8 bytes of arguments. Nothing reads them back.
    """
    copies, stores, loads = (
        sum(n for name, n in found.counts.items() if name.startswith(kind))
        for kind in ("UTMALDG", "STL.64", "LDL")
    )
    return found.job.arch == 120 and found.stack == 8 and 0 < stores <= copies and not loads


def narrow_accesses(found: Found) -> Iterator[str]:
    """Activations are read and written 16 bytes at a time.

    Bytes of the bit mask are narrower, and so are the sums of a program. In NCHW a channel is a row
    of the tile, and its parameters are read one by one; so are statistics that are only copied.
    An image's scale is one number.
    """
    job = found.job
    flags = dict(job.constants)
    kind = f"*{job.dtype}"
    data = [n for n, t in job.signature if t == kind and n in (*LOADED, *STREAMING[job.kernel])]
    data += [n for n in data if n in SIDE_BY_SIDE for _ in range(flags["PARTS"] - 1)]
    stored = [name for name in data if name in STREAMING[job.kernel]]
    size = 4 if job.dtype == "fp32" else 2
    each = flags["BLOCK_C"] * flags["BLOCK_HW"] * size // (16 * 32 * job.warps)
    present = dict(job.signature).keys() - flags.keys()
    narrow = {"U8"}
    if not flags["NHWC"] or "saved_mean_ptr" in present:
        narrow.add("32")
    if "arrived_ptr" in present:  # the sums of the other programs, and the counter
        narrow |= {"32", "64"}
    if "row_scale_ptr" in present:
        narrow.add("U16" if size == 2 else "32")
    loads, stores = found.widths("LDG"), found.widths("STG")
    for width in loads.keys() - {"128"} - narrow:
        yield f"{loads[width]} global loads of width {width}"
    if loads.get("128", 0) < each * (len(data) - len(stored)):
        yield f"{loads.get('128', 0)} loads of 16 bytes for {len(data) - len(stored)} tensors"
    count, wanted = stores.get("128", 0), each * len(stored)
    # The one loop that only copies is unrolled: whole tiles, several of them.
    copies = job.kernel == "dense_store_kernel" and "mean_ptr" not in present
    if stored and (count == 0 or count % wanted if copies else count != wanted):
        yield f"{stores.get('128', 0)} stores of 16 bytes for {len(stored)} tensors"
