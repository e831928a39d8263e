"""Packed weights and the sizes of inputs: when one is packed for, and what they share."""

from __future__ import annotations

import copy

import torch

import fusedres
from cases import randn
from fusedres.ops import layouts, packing
from modules import check_module
from test_packing import CountPackings, inference_pair


def test_sizes_and_dtypes_take_turns():
    fused, plain = inference_pair()
    with torch.no_grad():
        for size in (6, 7, 6, 8, 9, 10, 12, 6):
            for layout in ("NCHW", "NHWC"):
                check_module(fused, plain, randn((2, 16, size, size), layout=layout), graded=False)
        with CountPackings() as more:
            for size in (6, 7, 8, 9, 6):
                check_module(fused, plain, randn((2, 16, size, size)), graded=False)
    assert more.count == 0


def test_a_size_after_the_first_ones_is_packed_for_when_it_comes_again():
    layer = fusedres.ConvBNAct2d(16, 24, 3, padding=1).eval()
    plain = fusedres.unfuse(copy.deepcopy(layer))
    packed = []
    with torch.no_grad():
        for size in 3 * (6, 7, 8, 9, 10, 11, 12, 13):
            with CountPackings() as now:
                layer(randn((2, 16, size, size)))
            packed.append(now.count)
        for size in (6, 9, 10, 13, 14):
            check_module(layer, plain, randn((2, 16, size, size)), graded=False)
    assert packed == [1, 1, 1, 1, 0, 0, 0, 0] + [0, 0, 0, 0, 1, 1, 1, 1] + 8 * [0]


def test_sizes_share_layouts():
    layer = fusedres.ConvBNAct2d(512, 512, 3).eval()
    with torch.no_grad():
        for size in (56, 40, 28, 22, 56, 40, 28, 22):
            layer(randn((1, 512, size, size)))
    (entry,) = packing._cache[layer.conv.weight.untyped_storage()].values()
    (found,) = entry.layouts.values()
    assert len(found._of_size) == 4 and len(found._packed) < 4


def test_the_number_of_sizes_that_are_remembered_has_a_bound(monkeypatch):
    monkeypatch.setattr(layouts, "_KNOWN", 6)
    fused, plain = inference_pair()
    with torch.no_grad():
        for size in (*range(5, 14), *range(5, 14)):
            check_module(fused, plain, randn((1, 16, size, size)), graded=False)
    (entry,) = packing._cache[fused.conv1.weight.untyped_storage()].values()
    (found,) = entry.layouts.values()
    assert len(found._of_size) + len(found._seen) <= 6
