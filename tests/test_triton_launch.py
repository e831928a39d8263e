"""What lies around the Triton kernels: layouts, checks, addresses, launch counts."""

from __future__ import annotations

import threading

import pytest
import torch

import triton_cases
from cases import SHAPES, arrange, layouts, randn, sliced
from fusedres import triton_kernels
from fusedres.layout import mask_shape
from harness import same_bits

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

launch = triton_kernels.package().module("launch")
tile = triton_kernels.package().module("tile")
bn_act = triton_kernels.package().module("bn_act")
squeeze_excite = triton_kernels.package().module("squeeze_excite")
residual_mix = triton_kernels.package().module("residual_mix")
residual_add = triton_kernels.package().module("residual_add")
passes = triton_kernels.package().module("passes")

interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels are compiled here")


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("shape,layout", [*SHAPES.values(), ((4, 6, 11), "NCHW"), ((9, 5), "NCHW")])
def test_a_view_is_the_tensor_and_its_mask_the_layouts(shape, layout, images):
    x = arrange(torch.empty(shape), layout)
    view = launch.View("op", x, images=images)
    assert view.mask_shape() == mask_shape(x)
    assert view.n * view.c * view.hw == x.numel()
    assert (view.n == shape[0]) or (view.nhwc and not images)
    flags = view.flags(launch.Config(4096, 64, 4))
    assert flags["NHWC"] == view.nhwc and not flags["WIDE"]
    assert flags["BLOCK_C"] * flags["BLOCK_HW"] <= 4096
    assert flags["BLOCK_C" if view.nhwc else "BLOCK_HW"] % 8 == 0
    assert (view.c if view.nhwc else view.hw) % flags["ALIGN"] == 0


def test_a_row_that_32_bits_do_not_span_is_addressed_with_64():
    x = torch.empty((1, 2, 2**31), device="meta", dtype=torch.float16)
    flags = launch.View("op", x, images=False).flags(launch.Config(4096, 64, 4))
    assert flags["WIDE"]


@triton.jit
def address_kernel(first_ptr, last_ptr, pid, C, HW, tiles, NHWC: tl.constexpr, WIDE: tl.constexpr):
    """The lowest and the highest address that program ``pid`` reads in its first tile."""
    n, c0, i0, _ = tile.locate(pid, C, HW, tiles, NHWC, 16, 32)
    start, offs, inside = tile.tile(n, c0, i0, C, HW, NHWC, WIDE, 16, 32)
    address = tl.where(inside, offs.to(tl.int64) + start, start)
    tl.store(first_ptr, tl.min(address))
    tl.store(last_ptr, tl.max(address))


@interpreted
@pytest.mark.parametrize("n,c,hw,wide", [
    (1, 64, 2**27, False), (2**21, 40, 49, False), (3, 24, 2**28 + 5, True), (5, 7, 2**31, True),
])  # fmt: skip
@pytest.mark.parametrize("nhwc", [True, False])
def test_addresses_beyond_2_to_the_31_elements(nhwc, n, c, hw, wide):
    """The last program's tile ends with the tensor's last element."""
    blocks_c, tiles = launch.cdiv(c, 16), 3
    chunks = launch.cdiv(launch.cdiv(hw, 32), tiles)
    first, last = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
    pid = n * blocks_c * chunks - 1
    address_kernel[(1,)](first, last, pid, c, hw, tiles, nhwc, wide or c * 32 >= 2**31)
    c0, i0 = (blocks_c - 1) * 16, (chunks - 1) * tiles * 32
    end_c, end_i = c - 1, min(i0 + 32, hw) - 1
    images = (n - 1) * c * hw
    wanted = [
        images + (i * c + ch if nhwc else ch * hw + i) for i, ch in ((i0, c0), (end_i, end_c))
    ]
    assert [first.item(), last.item()] == wanted
    assert images + c * hw > 2**31


def apply_passes(x, stats) -> dict:
    """By the kernel whose pass it is, a call and its arguments; its first result is the pass's."""
    none, mask = [None] * 4, x.new_empty(0, dtype=torch.uint8)
    given, eps = (None, None, *stats, False, 1e-5), (1e-5, 1e-5)
    sums = False, False, False, False
    return {
        "stream_fwd_apply": (bn_act.bn_act, x, *given[:2], x, *given[2:], "relu", False),
        "stream_bwd_apply": (
            bn_act.bn_act_backward, x, x, None, None, None, *stats, mask, True, 1e-5, "relu", False,
        ),
        "residual_add_fwd": (
            residual_add.residual_add, x, *none, x, *none, None, False, False, *eps, "relu", *sums[2:],
        ),
        "residual_add_bwd_apply": (
            residual_add.residual_add_backward, x, x, *none, x, *none, None, mask, False, False,
            *eps, "relu", *sums[1:],
        ),
    }  # fmt: skip


@interpreted
@layouts
@pytest.mark.parametrize("name", apply_passes(torch.empty(0), (None, None)))
def test_an_apply_pass_begins_at_the_end_of_the_tensor(name, layout, monkeypatch):
    """Which the pass before left in the L2: only the first program runs, and writes the last tile."""

    def first_program(kernel, programs, *args, **options):
        if kernel.fn.__name__ != f"{name}_kernel":
            return launch.launch(kernel, programs, *args, **options)
        with monkeypatch.context() as inside:
            inside.setattr(tl, "num_programs", lambda axis: programs)
            return launch.launch(kernel, 1, *args, **options)

    for module in (passes, residual_add):
        monkeypatch.setattr(module, "launch", first_program)
    monkeypatch.setattr(bn_act, "WHOLE_PIXELS", 0)
    monkeypatch.setattr(bn_act, "_ways", lambda view, config: [bn_act.STREAMED])
    call, *args = apply_passes(randn((2, 32, 10, 13), layout=layout), STATS_32)[name]
    written = ~call(*args)[0].isnan()  # conftest.poisoned_memory
    # A tile has all channels of 64 or 128 pixels, of 260 in all (NHWC) or 130 of an image.
    last = torch.zeros_like(written).flatten(2)
    last[-1, :, -4 if layout == "NHWC" else -2 :] = True
    assert torch.equal(written.flatten(2), last)


# --- checks: what the Python layer never passes is refused by name

X = (2, 5, 4, 4)
STATS = torch.zeros(5), torch.ones(5)


def bn_args(**wrong):
    arguments = dict(
        x=randn(X), weight=torch.ones(5), bias=torch.ones(5), residual=randn(X), mean=STATS[0],
        var=STATS[1], batch_stats=False, eps=1e-5, act="relu", save_mask=True,
    )  # fmt: skip
    return bn_act.bn_act, (arguments | wrong).values()


def bn_backward_args(**wrong):
    arguments = dict(
        dy=randn(X), x=randn(X), weight=None, bias=None, residual=None, mean=STATS[0],
        var=STATS[1], mask=torch.zeros(10, 2, dtype=torch.uint8), batch_stats=True, eps=1e-5,
        act="relu", need_dresidual=False,
    )  # fmt: skip
    return bn_act.bn_act_backward, (arguments | wrong).values()


def se_args(**wrong):
    arguments = dict(
        x=randn(X), w1=torch.randn(2, 5), b1=torch.randn(2), w2=torch.randn(5, 2),
        b2=torch.randn(5), residual=None, act="relu", gate="sigmoid", post_act="relu",
        save_mask=False,
    )  # fmt: skip
    return squeeze_excite.squeeze_excite, (arguments | wrong).values()


def mix_args(**wrong):
    arguments = dict(
        branch=randn(X), shortcut=randn(X), gate=None, row_scale=None, alpha=1.0, beta=1.0,
        act="relu", save_mask=False,
    )  # fmt: skip
    return residual_mix.residual_mix, (arguments | wrong).values()


@pytest.mark.parametrize("call,error,message", [
    (bn_args(x=torch.randn(5)), ValueError, "x: wanted 2 or more dimensions, got 1"),
    (bn_args(x=sliced(randn(X))[0]), ValueError, "x: wanted a contiguous or channels_last tensor"),
    (bn_args(residual=randn(X, layout="NHWC")), ValueError, "residual: wanted x's memory layout"),
    (bn_args(residual=randn((2, 5, 4, 3))), ValueError, r"residual: wanted x's shape \(2, 5, 4, 4"),
    (bn_args(residual=randn(X, torch.float16)), TypeError, "residual: wanted torch.float32 on cpu"),
    (bn_args(weight=torch.ones(4)), ValueError, r"weight: wanted shape \(5,\), got \(4,\)"),
    (bn_args(mean=None), ValueError, "mean, var: wanted both, or neither with batch_stats"),
    (bn_args(mean=None, var=None), ValueError, "mean, var: wanted both"),
    (bn_backward_args(dy=randn((2, 5, 4, 3))), ValueError, "dy: wanted x's shape"),
    (bn_backward_args(mask=torch.zeros(3, 2, dtype=torch.uint8)), ValueError, r"mask: .*\(10, 2\)"),
    (bn_backward_args(mask=torch.zeros(10, 2)), ValueError, "mask: wanted contiguous torch.uint8"),
    (se_args(w1=torch.randn(2, 4)), ValueError, r"w1: wanted shape \(2, 5\), got \(2, 4\)"),
    (se_args(b2=torch.randn(2)), ValueError, r"b2: wanted shape \(5,\)"),
    (mix_args(row_scale=torch.ones(3)), ValueError, r"row_scale: wanted shape \(2,\), got \(3,\)"),
    (mix_args(gate=randn(X, layout="NHWC")), ValueError, "gate: wanted x's memory layout"),
], ids=lambda v: v[:12] if isinstance(v, str) else "")  # fmt: skip
def test_its_own_checks(call, error, message):
    function, args = call
    with (
        launch.dry_run() as launched,
        pytest.raises(error, match=f"{function.__name__}: {message}"),
    ):
        function(*args)
    assert launched == []


# --- counting and recording


@interpreted
def test_launches_are_counted_in_their_own_thread_and_context():
    x = randn((2, 3, 2, 2))

    def run():
        with triton_cases.triton_on("cpu"):
            torch.ops.fusedres.bn_stats(x)

    with launch.counted() as outer:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert outer == []
        with launch.counted() as inner:
            run()
    run()
    assert outer == inner == ["bn_act_fwd_grid_kernel"]


def test_a_dry_run_records_every_configuration_and_starts_nothing():
    x = randn((2, 16, 4, 4))
    with launch.dry_run() as recorded:
        y, mean, _, _ = bn_act.bn_act(x, None, None, None, *STATS_16, False, 1e-5, "relu", False)
    configs = triton_kernels.package().module("stream").APPLY_CONFIGS
    assert [one.name for one in recorded] == ["stream_fwd_apply_kernel"] * len(configs)
    assert [one.options["num_warps"] for one in recorded] == [c.warps for c in configs]
    assert all(one.options["enable_fp_fusion"] for one in recorded)
    assert y.isnan().all() and mean.isnan().all()  # conftest.poisoned_memory
    assert not same_bits(y, x) and not launch.is_dry()


STATS_32 = torch.zeros(32), torch.ones(32)
STATS_16 = torch.zeros(16), torch.ones(16)
