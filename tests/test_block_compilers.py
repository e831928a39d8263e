"""Blocks under torch.compile, torch.export and DistributedDataParallel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusedres
from cases import randn
from harness import assert_same_bits
from modules import block_pair, compare, results

X = (4, 16, 6, 6)


@pytest.mark.parametrize("name,training,compiler,options", [
    ("BasicBlock", True, "inductor", dict(stride=2)),
    ("BasicBlock", False, "aot_eager", dict(stride=2)),
    ("Bottleneck", True, "aot_eager", dict(planes=4, project=False)),
    ("SEBottleneck", True, "aot_eager", dict(stride=2)),
])  # fmt: skip
def test_compile(name, training, compiler, options):
    fused, plain = block_pair(name, **options)
    fused.train(training), plain.train(training)

    def run(block, x):
        step = torch.compile(block, fullgraph=True, backend=compiler) if block is fused else block
        return {n.replace("_orig_mod.", ""): t for n, t in results(step, x).items()}

    compare(run, fused, plain, randn(X, layout="NHWC"))


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compiled_inference(compiler):
    fused, plain = (b.eval() for b in block_pair("BasicBlock", stride=2))
    compiled = torch.compile(fused, fullgraph=True, backend=compiler)

    def run(block, x):
        with torch.no_grad():
            return {"y": (compiled if block is fused else block)(x)}

    compare(run, fused, plain, randn(X, layout="NHWC"))
    with torch.no_grad():
        for block in (fused, plain):
            block.conv1.weight.mul_(0.5)  # the compiled graph must not hold on to packed weights
    compare(run, fused, plain, randn(X, layout="NHWC"))


@pytest.mark.parametrize("training", [True, False])
def test_export_of_any_batch_size(training):
    fused, _ = (b.train(training) for b in block_pair("Bottleneck", stride=2))
    sizes = ({0: torch.export.Dim("batch", min=2, max=8)},)
    exported = torch.export.export(fused, (randn(X),), dynamic_shapes=sizes).module()
    assert exported(randn((3, *X[1:]))).shape[0] == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_pytorchs_ops(training):
    block, _ = (b.train(training) for b in block_pair("SEBasicBlock", stride=2))
    model, x = nn.Sequential(block, fusedres.BatchNormAct2d(8).train(training)), randn(X)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(x), model(x))
    assert "fusedres::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    fused, plain = (b.train(training) for b in block_pair("SEBasicBlock", stride=2))
    x = randn(X)
    with torch.set_grad_enabled(training):
        exported = torch.export.export(fused, (x,)).module()

    def run(block, x):
        with torch.set_grad_enabled(training):
            y = (exported if block is fused else block)(x)
        return {"y": y.detach()} | dict((exported if block is fused else block).named_buffers())

    compare(run, fused, plain, x)


@pytest.fixture
def one_process(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["BasicBlock", "SEBottleneck"])
def test_distributed_data_parallel(name, one_process):
    alone, replicated = (block_pair(name, stride=2)[0] for _ in range(2))
    replicated.load_state_dict(alone.state_dict())
    wrapped = nn.parallel.DistributedDataParallel(replicated)
    x = randn(X, layout="NHWC")
    for _ in range(2):
        out, found = results(alone, x), results(wrapped, x)
        assert_same_bits({n.replace("module.", ""): t for n, t in found.items()}, out)
