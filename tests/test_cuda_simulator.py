"""The host simulator of CUDA: its own kernels are right in every order, planted bugs are found."""

from __future__ import annotations

import os
import subprocess

import pytest

import cuda_host
from cuda_host import ORDERS, SIMULATOR

RIGHT = ("row_sum", "matmul", "named_barriers", "atomics", "shuffles", "votes", "through_shared",
         "mma_bfloat16", "mma_float16", "grid_sum", "cluster_sum", "ring", "async_ring",
         "matrices", "wgmma_bfloat16", "wgmma_float16", "wgmma_256", "im2col_3x3",
         "im2col_strided")  # fmt: skip

# A planted bug, the order it is run in, and what the simulator says of it.
STOPPED = {
    "barrier_for_some": ("forward", "divergent barrier: thread 32,0,0 of block 0,0,0 has returned, thread 0,0,0 of block 0,0,0 waits at __syncthreads (blocks.cpp:"),
    "barriers_at_two_lines": ("forward", "divergent barrier: thread 32,0,0 of block 0,0,0 is at __syncthreads (blocks.cpp:"),
    "barriers_of_two_kinds": ("random", "deadlock: 32 at __syncthreads (blocks.cpp:"),
    "too_much_shared": ("forward", "stopped: invalid argument"),
    "too_much_shared_together": ("forward", "shared memory: 49408 bytes, the kernel may have 49152"),
    "shuffle_outside_mask": ("forward", "a shuffle reads lane 20, which is not in its mask 0x0000ffff"),
    "two_operations": ("forward", "divergent warp: thread 1,0,0 of block 0,0,0 calls __shfl_xor_sync, others __ballot_sync with the same mask"),
    "lane_has_returned": ("random", "divergent warp: thread 7,0,0 of block 0,0,0 has returned, others wait for it in __shfl_xor_sync"),
    "grid_sum_not_cooperative": ("forward", "grid.sync in a launch that is not cooperative"),
    "grid_too_large": ("forward", "stopped: too many blocks in cooperative launch"),
    "cluster_sum_without_sync": ("forward", "map_shared_rank: block 1 of the cluster has not declared, part is not there: a cluster.sync is missing"),
    "cluster_sum_without_last_sync": ("forward", "map_shared_rank: block 0 of the cluster has returned, part is not there: a cluster.sync is missing"),
    "ring_without_empty_wait": ("forward", "mbarrier: more arrivals than expected in one phase"),
    "ring_without_full_wait": ("forward", "mbarrier: more arrivals than expected in one phase"),
    "ring_with_wrong_phase": ("forward", "mbarrier: more arrivals than expected in one phase"),
    "ring_without_arrival": ("forward", "deadlock: 65 at mbarrier_wait"),
    "async_ring_misaligned": ("forward", "copy_async: wanted addresses that are multiples of 16"),
    "wgmma_without_full_wait": ("forward", "a copy overwrites shared memory that a wgmma still reads"),
    "wgmma_early_release": ("forward", "a copy overwrites shared memory that a wgmma still reads"),
    "wgmma_without_fence": ("random", "has not called wgmma_fence in this group"),
    "wgmma_writes_in_flight": ("forward", "wgmma: thread 0,0,0 of block 0,0,0 wrote to an accumulator in use"),
    "wgmma_wrong_stride": ("forward", "wgmma reads shared memory that a copy has yet to fill"),
    "wgmma_thread_missing": ("random", "some threads of the warpgroup did not start a product"),
    "copy_beyond_shared": ("forward", "a copy: bytes 33792 to 41984 are in no array of the block's shared memory"),
    "copy_not_at_swizzle": ("forward", "wanted an address that is a multiple of the swizzle's 1024 bytes"),
    "misaligned_map": ("forward", "stopped: invalid argument"),
}  # fmt: skip
# Found by their values: poison, or what another thread has not written yet.
WRONG = {
    "row_sum_without_barrier": "forward",
    "row_sum_one_behind": "forward",
    "matmul_without_barrier": "forward",
    "matmul_without_second_barrier": "forward",
    "grid_sum_without_sync": "forward",
    "async_ring_without_wait": "forward",
    "async_ring_waits_for_one_less": "forward",
    "async_ring_without_commit": "forward",
    "async_ring_without_barrier": "forward",
    "async_ring_overtakes_its_readers": "forward",
    "wgmma_without_wait": "forward",
    "wgmma_without_operand_step": "forward",
    "im2col_without_wait": "forward",
}
# Found by AddressSanitizer or UndefinedBehaviorSanitizer, and the file they name.
OUT_OF_BOUNDS = {
    "row_sum_one_behind": ("heap-buffer-overflow", "blocks.cpp"),  # global memory
    "matmul_one_behind": ("heap-buffer-overflow", "blocks.cpp"),  # dynamic shared memory
    "static_overrun": ("index 32 out of bounds for type", "blocks.cpp"),
    "misaligned_vector": ("misaligned address", "blocks.cpp"),
    "copy_beyond_tensor": ("heap-buffer-overflow", "tensor_maps.cpp"),
}
# Found by ThreadSanitizer, whatever the values were.
RACES = {
    "row_sum_without_barrier": "blocks.cpp",
    "matmul_without_barrier": "blocks.cpp",
    "matmul_without_second_barrier": "blocks.cpp",
    "race_without_atomics": "blocks.cpp",
    "race_of_blocks": "blocks.cpp",
    "shuffle_as_barrier": "warps.cpp",
    "grid_sum_without_sync": "grids.cpp",
    "async_ring_without_barrier": "copies.cpp",
    "async_ring_overtakes_its_readers": "copies.cpp",
    "im2col_without_wait": "hopper.cpp",
}


def selftest(flavour: str, case: str, order: str) -> tuple[int, str]:
    """Exit status and output."""
    sources = sorted((SIMULATOR / "selftest").glob("*.cpp"))
    command = cuda_host.program("selftest", sources, flavour, ops=False)
    environment = {**os.environ, **cuda_host.ENVIRONMENT}
    done = subprocess.run(
        [*command, case, order], capture_output=True, text=True, env=environment, timeout=100
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels(case, order):
    assert selftest("plain", case, order) == (0, "right\n")


@pytest.mark.parametrize("case", STOPPED)
def test_the_simulator_stops(case):
    order, message = STOPPED[case]
    status, output = selftest("plain", case, order)
    assert status == 2 and message in output, output


@pytest.mark.parametrize("case", WRONG)
def test_values_are_wrong(case):
    assert selftest("plain", case, WRONG[case]) == (1, "wrong values\n")


@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels_within_bounds(case):
    assert selftest("asan", case, "random") == (0, "right\n")


@pytest.mark.parametrize("case", OUT_OF_BOUNDS)
def test_the_address_sanitizer_sees(case):
    status, output = selftest("asan", case, "forward")
    kind, file = OUT_OF_BOUNDS[case]
    assert status == 99 and kind in output and file in output, output


@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels_without_races(case):
    assert selftest("tsan", case, "forward") == (0, "right\n")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", RACES)
def test_the_thread_sanitizer_sees(case, order):
    status, output = selftest("tsan", case, order)
    assert status == 66, output
    assert "ThreadSanitizer: data race" in output and RACES[case] in output, output
