"""AddLayerNorm, AddRMSNorm and TransformerEncoderLayer against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth

import fusedres
from accuracy import assert_as_accurate_as_eager
from cases import randn
from fusedres import observers
from harness import Unchanged
from modules import randomise

D, L, N = 24, 7, 3


class Seeded(nn.Module):
    """Runs a module with the random numbers of one seed."""

    def __init__(self, module: nn.Module, **kwargs):
        super().__init__()
        self.module, self.kwargs = module, kwargs

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return self.module(x, **self.kwargs)


class PlainDropPath(nn.TransformerEncoderLayer):
    """PyTorch's layer with torchvision's stochastic depth on each branch."""

    drop_path = 0.5

    def _sa_block(self, *args, **kwargs) -> Tensor:
        return self._drop(super()._sa_block(*args, **kwargs))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self._drop(super()._ff_block(x))

    def _drop(self, x: Tensor) -> Tensor:
        batch_dim = 0 if self.self_attn.batch_first else 1
        x = stochastic_depth(x.transpose(0, batch_dim), self.drop_path, "row", self.training)
        return x.transpose(0, batch_dim)


def layer_pair(drop_path=0.0, **options):
    """Our layer and its eager twin in the same state."""
    plain_kind = PlainDropPath if drop_path else nn.TransformerEncoderLayer
    options = dict(d_model=D, nhead=4, dim_feedforward=40) | options
    plain = randomise(plain_kind(**options))
    fused = fusedres.TransformerEncoderLayer(**options, drop_path=drop_path)
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict())
    return fused, plain


def compare(fused, plain, x, *, graded=True, **kwargs):
    """Output and gradients of both, and of the plain one in float64, by the accuracy rule."""
    truth = copy.deepcopy(plain).double()
    double = {
        n: v.double() if v is not None and v.is_floating_point() else v
        for n, v in kwargs.items()
        if isinstance(v, Tensor)
    }
    found = []
    for module, scale in ((fused, None), (plain, None), (truth, torch.float64)):
        leaf = x.detach().to(scale or x.dtype).requires_grad_(graded)
        torch.manual_seed(5)
        y = module(leaf, **(kwargs | (double if scale else {})))
        results = {"y": y.detach()}
        if graded:
            module.zero_grad()
            weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
            (y * weight).sum().backward()
            results |= {n: p.grad for n, p in module.named_parameters()} | {"dx": leaf.grad}
        found.append(results)
    ours, eager, ref = found
    for name, value in ours.items():
        count = 1 if name in ("y", "dx") else x.numel() // D
        if value.dtype == torch.float64:
            count *= 4 * D  # the reference shares eager's roundings, so eager's error reads as zero
        assert_as_accurate_as_eager(
            value, ref[name], eager[name], gradient=name != "y", count=count, name=name
        )


VARIANTS = {
    "post_norm": {},
    "pre_norm": dict(norm_first=True),
    "batch_first": dict(batch_first=True),
    "pre_norm_batch_first": dict(norm_first=True, batch_first=True),
    "no_dropout": dict(dropout=0.0, norm_first=True),
    "gelu": dict(activation="gelu", batch_first=True),
    "no_bias": dict(bias=False, layer_norm_eps=1e-3),
    "drop_path": dict(drop_path=0.5),
    "drop_path_pre_norm": dict(drop_path=0.5, norm_first=True, batch_first=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_training(name, dtype):
    fused, plain = (m.to(dtype) for m in layer_pair(**VARIANTS[name]))
    shape = (N, L, D) if fused.self_attn.batch_first else (L, N, D)
    compare(fused, plain, randn(shape, dtype))


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("name", ["post_norm", "pre_norm_batch_first", "no_bias", "drop_path"])
def test_evaluation(name, graded):
    fused, plain = (m.eval() for m in layer_pair(**VARIANTS[name]))
    with torch.set_grad_enabled(graded):
        compare(fused, plain, randn((N, L, D)), graded=graded)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_masks(training, norm_first):
    fused, plain = (m.train(training) for m in layer_pair(batch_first=True, norm_first=norm_first))
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    x = randn((N, L, D))
    compare(fused, plain, x, src_key_padding_mask=padding)
    compare(fused, plain, x, src_mask=causal, is_causal=True)
    compare(fused, plain, x, src_mask=causal, src_key_padding_mask=padding.float() * -1e9)


def test_one_sequence_without_batch():
    fused, plain = layer_pair()
    compare(fused, plain, randn((L, D)))
    fused, _ = layer_pair(drop_path=0.5)
    with pytest.raises(ValueError, match="src: wanted 3 dimensions .* got 2"):
        fused(randn((L, D)))


@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast(norm_first):
    fused, plain = layer_pair(norm_first=norm_first)
    x = randn((L, N, D))
    truth = copy.deepcopy(plain).double()
    with torch.autocast("cpu", torch.bfloat16):
        y, eager = (Seeded(m)(x).detach() for m in (fused, plain))
    # float64 does not take part in autocast; bfloat16 is the coarsest dtype that both computed in.
    y, eager = y.bfloat16(), eager.bfloat16()
    assert_as_accurate_as_eager(y, Seeded(truth)(x.double()).detach(), eager)


def test_inside_of_an_encoder():
    """nn.TransformerEncoder sees one of PyTorch's layers, nested tensors and all."""
    fused, plain = (nn.TransformerEncoder(m, 2) for m in layer_pair(batch_first=True))
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 4:] = True
    compare(fused, plain, randn((N, L, D)), src_key_padding_mask=padding)
    fused, plain = fused.eval(), plain.eval()
    with torch.no_grad():
        compare(fused, plain, randn((N, L, D)), graded=False, src_key_padding_mask=padding)


@pytest.mark.parametrize("what", ["hook", "norm"])
def test_what_cannot_be_fused_runs_as_pytorchs(what):
    fused, plain = layer_pair(drop_path=0.5)
    calls, events = [], []
    if what == "hook":
        fused.norm1.register_forward_hook(lambda *_: calls.append(1))
    if what == "norm":
        fused.norm1, plain.norm1 = nn.RMSNorm(D), nn.RMSNorm(D)
    with observers.observe(events.append):
        compare(fused, plain, randn((L, N, D)))
    assert {e.backend for e in events if e.op == "add_norm"} >= {"unfused"}
    assert len(calls) == (what == "hook")


def test_what_is_kept_for_the_backward():
    """Less than eager: a byte an element for dropout instead of a number."""
    sizes = []
    for module in layer_pair(dropout=0.1):
        kept = {}

        def pack(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = module(randn((64, N, D)).requires_grad_())
        assert y.requires_grad
        sizes.append(sum(n for n, _ in kept.values()))
    rows = 64 * N * D
    assert sizes[1] - sizes[0] >= 2 * 3 * rows * 0.9  # 4 bytes of noise became 1, twice


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    fused, plain = layer_pair()
    compare(fused, plain, randn((L, N, D)))
    x = randn((L, N, D))
    grads = []
    for run in (fused, lambda t: checkpoint(fused, t, use_reentrant=use_reentrant)):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        run(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("norm_first", [False, True])
def test_compile(norm_first):
    fused, plain = layer_pair(norm_first=norm_first, dropout=0.0)
    fused.compile(fullgraph=True, backend="aot_eager")
    compare(fused, plain, randn((L, N, D)))


def test_copies_and_pickles(tmp_path):
    fused, _ = layer_pair(drop_path=0.25)
    x = randn((L, N, D))
    torch.save(fused, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    for other in (copy.deepcopy(fused), loaded):
        assert other.drop_path == 0.25
        assert torch.equal(Seeded(other)(x), Seeded(fused)(x))


# --- the modules AddLayerNorm and AddRMSNorm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "ours,theirs", [(fusedres.AddLayerNorm, nn.LayerNorm), (fusedres.AddRMSNorm, nn.RMSNorm)]
)
def test_norm_modules(ours, theirs, training, affine):
    plain = randomise(theirs(D, elementwise_affine=affine))
    fused = ours(D, elementwise_affine=affine, dropout=0.25, drop_path=0.5).train(training)
    fused.load_state_dict(plain.state_dict())
    assert list(fused.state_dict()) == list(plain.state_dict())
    x, residual = randn((N, L, D)), randn((N, L, D))
    torch.manual_seed(5)
    y, total = fused(x, residual)
    torch.manual_seed(5)
    wanted = residual + stochastic_depth(F.dropout(x, 0.25, training), 0.5, "row", training)
    assert_as_accurate_as_eager(total, wanted.double(), wanted)
    truth = copy.deepcopy(plain).double()
    assert_as_accurate_as_eager(y, truth(wanted.double()), plain(wanted))


@pytest.mark.parametrize(
    "ours,theirs", [(fusedres.AddLayerNorm, nn.LayerNorm), (fusedres.AddRMSNorm, nn.RMSNorm)]
)
def test_norm_modules_are_pytorchs(ours, theirs):
    module = ours((4, 6), dropout=0.1, dtype=torch.float64)
    assert isinstance(module, theirs) and module.weight.dtype == torch.float64
    assert "dropout=0.1, drop_path=0.0" in repr(module)
    for name in ("dropout", "drop_path"):
        with pytest.raises(ValueError, match=f"{name}: wanted a probability"):
            ours(8, **{name: 2.0})


def test_an_error_changes_nothing():
    fused, _ = layer_pair()
    x, state = randn((L, N, D + 1)), torch.get_rng_state()
    with Unchanged(fused), pytest.raises((AssertionError, RuntimeError)):
        fused(x)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="drop_path: wanted a probability from 0 to 1, got 1.5"):
        fusedres.TransformerEncoderLayer(D, 4, drop_path=1.5)


@pytest.mark.parametrize("train", [True, False])
def test_explain_and_verify(train):
    fused, _ = layer_pair(norm_first=True, dropout=0.0)
    x = randn((L, N, D))
    rows = fusedres.explain(fused.train(train), x).rows
    assert [r.backend for r in rows if r.op == "add_norm"] == ["native", "native"]
    result = fusedres.verify(fused, x, train=train)
    assert result.ok, str(result)


@pytest.mark.parametrize("name", ["_sa_block", "_ff_block"])
def test_a_part_that_was_replaced_is_called(name):
    layer, x = fusedres.TransformerEncoderLayer(8, 2, 16, dropout=0.0), randn((3, 2, 8))
    own, calls = getattr(layer, name), []
    setattr(layer, name, lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    wanted = fusedres.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    wanted.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), wanted(x))
    assert calls == [1]
