"""fuse and unfuse on nn.TransformerEncoderLayer, alone and inside of PyTorch's own models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fusedres
import zoo
from cases import randn
from fusedres import observers
from fusedres.ops.convolution import upcasts
from modules import randomise
from test_transformer import VARIANTS, D, L, N, compare

OPTIONS = {n: v for n, v in VARIANTS.items() if "drop_path" not in v}


def layer(**options) -> nn.Module:
    return randomise(
        nn.TransformerEncoderLayer(**dict(d_model=D, nhead=4, dim_feedforward=40) | options)
    )


def shape_of(module: nn.Module) -> tuple[int, ...]:
    first = next(m for m in module.modules() if isinstance(m, nn.TransformerEncoderLayer))
    return (N, L, D) if first.self_attn.batch_first else (L, N, D)


def ops_run(module: nn.Module, *args, **kwargs) -> set[tuple[str, str, str | None]]:
    events = []
    with observers.observe(events.append):
        module(*args, **kwargs)
    return {(e.op, e.backend, e.reason) for e in events}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_training(name, dtype):
    plain = layer(**OPTIONS[name]).to(dtype)
    fused = fusedres.fuse(plain)
    x = randn(shape_of(plain), dtype)
    compare(fused, plain, x)
    wanted = {("add_norm", "native", None)}
    if upcasts(x):  # the feed-forward's products
        wanted.add(("conv_stats", "native", None))
    assert ops_run(fused, x) == wanted


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("name", ["post_norm", "pre_norm_batch_first"])
def test_evaluation(name, graded):
    plain = layer(**OPTIONS[name]).eval()
    fused = fusedres.fuse(plain)
    with torch.set_grad_enabled(graded):
        compare(fused, plain, randn(shape_of(plain)), graded=graded)


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_with_masks(norm_first):
    """All of its layers, which it calls with keywords; its state dict, its nested tensors."""
    one = layer(batch_first=True, norm_first=norm_first)
    plain = nn.TransformerEncoder(one, 2, nn.LayerNorm(D), enable_nested_tensor=not norm_first)
    fused = fusedres.fuse(plain)
    assert zoo.swapped(plain) == ["layers.0", "layers.1"]
    zoo.assert_same_state(plain, fused)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 4:] = True
    x, causal = randn((N, L, D)), nn.Transformer.generate_square_subsequent_mask(L)
    compare(fused, plain, x, src_key_padding_mask=padding)
    compare(fused, plain, x, mask=causal, is_causal=True)
    plain.eval(), fused.eval()
    with torch.no_grad():
        compare(fused, plain, x, graded=False, src_key_padding_mask=padding)
    unfused = fusedres.unfuse(fused)
    zoo.assert_same_classes(unfused, plain)
    zoo.assert_same_state(unfused, plain)


def test_a_whole_transformer():
    """The encoder's layers are fused, the decoder's run as they are."""
    plain = randomise(nn.Transformer(D, 4, 2, 1, 40, dropout=0.0))
    fused = fusedres.fuse(plain)
    source, target = randn((L, N, D)), randn((5, N, D))
    torch.testing.assert_close(fused(source, target), plain(source, target))
    assert zoo.swapped(plain) == ["encoder.layers.0", "encoder.layers.1"]


@pytest.mark.parametrize("what,reason", [
    ("hook", "LayerNorm has hooks"),
    ("norm", "RMSNorm is not a plain LayerNorm"),
    ("dropout", "AlphaDropout is not a plain Dropout"),
    ("inference", "PyTorch's own inference path"),
])  # fmt: skip
def test_what_cannot_be_fused_says_why(what, reason):
    plain, calls = layer(batch_first=True), []
    if what == "norm":
        plain.norm1 = nn.RMSNorm(D)
    if what == "dropout":
        plain.dropout2 = nn.AlphaDropout(0.1)
    fused = fusedres.fuse(plain)
    if what == "hook":
        fused.norm1.register_forward_hook(lambda *_: calls.append(1))
    x = randn((N, L, D))
    if what == "inference":
        plain.eval(), fused.eval()
    with torch.set_grad_enabled(what != "inference"):
        assert ops_run(fused, x) == {("add_norm", "unfused", reason)}
        compare(fused, plain, x, graded=what != "inference")
    assert len(calls) == 2 * (what == "hook")


def test_subclasses_with_blocks_of_their_own_are_left_alone():
    class Scaled(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return 0.5 * super()._ff_block(x)

    with pytest.raises(ValueError, match="or nn.TransformerEncoderLayer, got a Scaled"):
        fusedres.fuse(Scaled(D, 4))


def test_trace_compile_copy_and_pickle():
    plain = layer(dropout=0.0)
    fused, x = fusedres.fuse(plain), randn((L, N, D))
    for other in (
        copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)),
        torch.compile(fused, fullgraph=True, backend="aot_eager"),
    ):  # fmt: skip
        torch.testing.assert_close(other(x), plain(x))
    traced = torch.jit.trace(fused, x, check_trace=False)
    torch.testing.assert_close(traced(x), plain(x))


@pytest.mark.parametrize("train", [True, False])
def test_explain_and_verify(train):
    encoder = nn.TransformerEncoder(layer(dropout=0.0), 2, enable_nested_tensor=False)
    fused, x = fusedres.fuse(encoder).train(train), randn((L, N, D))
    rows = fusedres.explain(fused, x).rows
    assert [(r.module, r.backend) for r in rows if r.op == "add_norm"] == [
        (f"layers.{i}", "native") for i in (0, 0, 1, 1)
    ]
    result = fusedres.verify(fused, x, train=train)
    assert result.ok, str(result)
