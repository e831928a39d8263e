"""fuse and unfuse themselves: Sequentials, errors, copies, wrappers, this library's own blocks."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
import zoo
from fusedres import observers


def conv_bn_relu(inputs: int, outputs: int, **options) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, **options), nn.BatchNorm2d(outputs), nn.ReLU()]


def two_layers() -> nn.Sequential:
    return nn.Sequential(*conv_bn_relu(3, 8), *conv_bn_relu(8, 4, stride=2))


class Twice(nn.Sequential):
    def forward(self, x):
        return super().forward(super().forward(x))


class Named(nn.Sequential):
    pass


RUNS = {
    "two layers": two_layers,
    "no activation": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
    "bias": lambda: nn.Sequential(*conv_bn_relu(3, 8, bias=True)),
    "ends in a convolution": lambda: nn.Sequential(*conv_bn_relu(3, 8), nn.Conv2d(8, 4, 1)),
    "others between": lambda: nn.Sequential(
        nn.AvgPool2d(2), *conv_bn_relu(3, 8), nn.Dropout(0.5), *conv_bn_relu(8, 8), nn.Softplus()
    ),
    "nested": lambda: nn.Sequential(
        nn.Sequential(*conv_bn_relu(3, 8)), Named(nn.Identity(), *conv_bn_relu(8, 4))
    ),
    "squeeze-excite between norm and activation": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), fusedres.SqueezeExcite(8, 2), nn.ReLU(),
        nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4),
    ),
    "unknown activation": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Softshrink(), nn.LeakyReLU(0.2), nn.GELU("tanh")
    ),
    "unfusable norm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), *conv_bn_relu(8, 4)
    ),
    "shared activation": lambda: (
        lambda relu: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), relu, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), relu
        )
    )(nn.ReLU(inplace=True)),
    "named subclass": lambda: Named(*conv_bn_relu(3, 8)),
    "norm before": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), *conv_bn_relu(3, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_run_is_the_same_fused(name):
    model = RUNS[name]()
    fused = zoo.assert_same_network(model, zoo.images(3, 12))
    zoo.assert_same_state(fusedres.unfuse(fused), model)


def test_sequential_stays_a_sequential():
    model = Named(*conv_bn_relu(3, 8), *conv_bn_relu(8, 4)).eval()
    fused = fusedres.fuse(model)
    assert isinstance(fused, Named) and len(fused) == 6 and fused[1].num_features == 8
    assert [name for name, _ in fused.named_children()] == ["0", "1", "2", "3", "4", "5"]
    x = zoo.images(2, 8)
    torch.testing.assert_close(fused[:3](x), model[:3](x))
    fused.append(nn.Conv2d(4, 2, 1))
    assert fused(x).shape == (2, 2, 8, 8)
    del fused[-1]
    torch.testing.assert_close(fused(x), model(x))


def test_original_is_left_alone_unless_inplace():
    model = two_layers()
    fused = fusedres.fuse(model)
    assert type(model) is nn.Sequential and fused is not model
    assert fused[0].weight.data_ptr() != model[0].weight.data_ptr()
    weights = list(model.parameters())
    assert fusedres.fuse(model, inplace=True) is model and type(model) is type(fused)
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    assert fusedres.unfuse(model, inplace=True) is model and type(model) is nn.Sequential


def test_fusing_and_unfusing_twice_is_the_same_as_once():
    fused = fusedres.fuse(two_layers())
    zoo.assert_same_classes(fusedres.fuse(fused), fused)
    unfused = fusedres.unfuse(fused)
    zoo.assert_same_classes(fusedres.unfuse(unfused), unfused)
    nothing = nn.Linear(2, 2)
    assert fusedres.unfuse(nothing, inplace=True) is nothing


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", [fusedres.fuse, fusedres.unfuse])
def test_what_is_no_module(call):
    for wrong in ({"a": 1}, None, nn.Sequential, torch.zeros(1)):
        with pytest.raises(TypeError, match="wanted a torch.nn.Module, got"):
            call(wrong)
    with pytest.raises(TypeError, match="ScriptModule"):
        call(torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))))


def test_nothing_to_fuse_names_what_was_found():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    for inplace in (False, True):
        with pytest.raises(ValueError, match="got a Sequential of 2 Linear, ReLU"):
            fusedres.fuse(model, inplace=inplace)
    with pytest.raises(ValueError, match="got a Twice of"):
        fusedres.fuse(Twice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    patched = two_layers()
    patched.forward = patched.forward
    with pytest.raises(ValueError, match="got a Sequential"):
        fusedres.fuse(patched)


def test_failure_half_way_leaves_the_model_as_it_was():
    class Rigid(nn.Sequential):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise RuntimeError("no other class")
            super().__setattr__(name, value)

    model = nn.ModuleList([two_layers(), Rigid(*conv_bn_relu(3, 8)), two_layers()])
    with pytest.raises(RuntimeError, match="no other class"):
        fusedres.fuse(model, inplace=True)
    assert [type(m) for m in model] == [nn.Sequential, Rigid, nn.Sequential]


def test_class_derived_after_fusing_is_not_guessed_at():
    model = fusedres.fuse(two_layers())
    model.__class__ = type("Sharded", (type(model),), {})
    with pytest.raises(ValueError, match="model of a class Sharded that was derived later"):
        fusedres.unfuse(model)
    assert pickle.loads(pickle.dumps(copy.deepcopy(two_layers()))) is not None


def test_copies_and_files():
    fused = fusedres.fuse(two_layers()).eval()
    fused[0].register_buffer("note", torch.ones(1))
    x = zoo.images(2, 8)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    copies = [copy.deepcopy(fused), copy.copy(fused), torch.load(file, weights_only=False)]
    copies += [pickle.loads(pickle.dumps(fused, protocol)) for protocol in (0, 2, 5)]
    for other in copies:
        zoo.assert_same_classes(other, fused)
        assert other.training is False and "0.note" in other.state_dict()
        torch.testing.assert_close(other(x), fused(x), rtol=0, atol=0)


@pytest.mark.parametrize("train", [False, True])
def test_compiles_into_one_graph(train):
    model = nn.Sequential(*conv_bn_relu(3, 8), fusedres.SqueezeExcite(8, 2)).train(train)
    fused = fusedres.fuse(model)
    x = zoo.images(2, 8)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fused(x))


def test_wrapped_models_are_fused_inside():
    wrapper = nn.DataParallel(two_layers(), device_ids=[])
    fused = fusedres.fuse(wrapper)
    assert type(fused) is nn.DataParallel and "Fused" in repr(fused.module)
    x = zoo.images(2, 8)
    torch.testing.assert_close(fused.eval()(x), wrapper.eval()(x))


def test_distributed_model_is_fused_in_place(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        plain = two_layers()
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        fusedres.fuse(model, inplace=True)
        x = zoo.images(2, 8)
        ours, ref = zoo.train_step(model, x), zoo.train_step(plain, x)
        torch.testing.assert_close(ours["output"], ref["output"])
    finally:
        torch.distributed.destroy_process_group()


def test_model_on_the_meta_device():
    with torch.device("meta"):
        model = two_layers()
    fused = fusedres.fuse(model, inplace=True).to_empty(device="cpu")
    source = two_layers()
    fused.load_state_dict(source.state_dict())
    x = zoo.images(2, 8)
    torch.testing.assert_close(fused.eval()(x), source.eval()(x))


def test_functional_call_and_symbolic_trace():
    model = two_layers().eval()
    fused, x = fusedres.fuse(model), zoo.images(2, 8)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    called = (torch.func.functional_call(m, zeros, (x,)) for m in (fused, model))
    torch.testing.assert_close(*called)
    traced = torch.fx.symbolic_trace(fused)
    assert all(node.op != "call_function" for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_records_the_original_code():
    model, x = two_layers().eval(), zoo.images(2, 8)
    fused = fusedres.fuse(model)
    for compiled in (torch.jit.trace(fused, x), torch.jit.script(fused)):
        assert "fusedres" not in str(compiled.inlined_graph)
        torch.testing.assert_close(compiled(x), model(x))


BLOCKS = {
    "basic": lambda: fusedres.BasicBlock(8, 8),
    "projected": lambda: fusedres.BasicBlock(
        8, 16, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))
    ),
    "bottleneck": lambda: fusedres.Bottleneck(8, 2),
    "se basic": lambda: fusedres.SEBasicBlock(8, 8, reduction=4),
    "se bottleneck": lambda: fusedres.SEBottleneck(8, 2, reduction=4),
    "norm": lambda: fusedres.BatchNormAct2d(8, act="silu"),
    "conv": lambda: fusedres.ConvBNAct2d(8, 4, 3, act="gelu"),
    "se": lambda: fusedres.SqueezeExcite(8, 2, gate="hard_sigmoid"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_own_block_unfuses_to_plain_pytorch(name):

    block, events = BLOCKS[name](), []
    plain = fusedres.unfuse(block)
    zoo.assert_same_state(plain, block)
    x = zoo.images(2, 6, channels=8).double()
    with observers.observe(events.append):
        ref = zoo.train_step(plain.double(), x)
    assert not events and "Unfused" in repr(plain)
    torch.testing.assert_close(zoo.train_step(copy.deepcopy(block).double(), x), ref)
    zoo.assert_same_classes(fusedres.fuse(plain), fusedres.fuse(block))
    zoo.assert_same_classes(pickle.loads(pickle.dumps(plain)), plain)


def test_own_residual_arguments_survive_unfusing():
    x = zoo.images(2, 6, channels=8)
    norm = fusedres.BatchNormAct2d(8)
    torch.testing.assert_close(fusedres.unfuse(norm)(x, x), norm(x, x))
    se = fusedres.SqueezeExcite(8, 2)
    torch.testing.assert_close(fusedres.unfuse(se)(x, x, "relu"), F.relu(se(x) + x))


def test_own_network_exports_after_unfusing():
    model = fusedres.models.resnet18(num_classes=4).eval()
    exported = torch.export.export(fusedres.unfuse(model), (zoo.images(),))
    assert not [n for n in exported.graph.nodes if "fusedres" in str(n.target)]
    torch.testing.assert_close(exported.module()(zoo.images()), model(zoo.images()))
