"""One run of a model, by name: what ``verify`` compares, and how the model is made to run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Results = dict[str, Tensor]

# Roundings by which the numbers of a model are moved to stand in for eager in float64.
_ROUNDINGS = 4
_SEED = 0


class Step:
    """One forward of a model, which it changes, and what is compared of it, by name."""

    def __init__(self, model: nn.Module, inputs: tuple, train: bool):
        torch.manual_seed(_SEED)
        self._model, self._train = model.train(train), train
        self._inputs = tree_map_only(Tensor, lambda t: _leaf(t, train), inputs)
        self._outputs = _named_outputs(model(*self._inputs))
        if not self._outputs:
            raise ValueError("model: wanted a forward that returns tensors, got one without")

    def results(self) -> Results:
        outputs = {name: t.detach() for name, t in self._outputs.items()}
        buffers = {f"buffer {n}": b.detach() for n, b in self._model.named_buffers()}
        return outputs | self.gradients() | buffers

    def gradients(self) -> Results:
        """Gradients for a random gradient of the outputs; zeros where none arrives."""
        parameters = self._model.named_parameters()
        wanted = {f"gradient of {n}": p for n, p in parameters if p.requires_grad}
        for i, t in enumerate(_leaves(self._inputs)):
            if t.requires_grad:
                wanted[f"gradient of input {i}"] = t
        starts = [t for t in self._outputs.values() if t.requires_grad]
        if not self._train or not starts:
            return {}
        random = torch.Generator().manual_seed(_SEED)
        # Rounded to bfloat16, so that every execution gets the same values in its own dtype.
        cotangents = [torch.randn(t.shape, generator=random).bfloat16().to(t) for t in starts]
        grads = torch.autograd.grad(
            starts, list(wanted.values()), cotangents,
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return dict(zip(wanted, grads, strict=True))


def _named_outputs(value: object, name: str = "output") -> Results:
    """The tensors in a forward's result: a tensor, or any nesting of mappings and sequences."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        items = [(f"{name}.{key}", v) for key, v in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        items = [(f"{name} {i}", v) for i, v in enumerate(value)]
    else:
        return {}
    found: Results = {}
    for key, v in items:
        found |= _named_outputs(v, key)
    return found


def on_plain_modules(model: nn.Module) -> nn.Module:
    """A copy that runs on PyTorch's own modules."""
    from ..convert import unfuse  # here, because convert is built on the blocks that call dispatch

    plain = copy.deepcopy(model)
    with contextlib.suppress(TypeError, ValueError):  # compiled, or hidden by a later subclass:
        unfuse(plain, inplace=True)  # then its ops run on the reference backend
    for module in plain.modules():
        module.register_forward_hook(_count_outputs)
    return plain


def _count_outputs(module: nn.Module, args, output) -> None:
    """Keeps the module from being fused, by being there, and remembers the size of its output."""
    if isinstance(output, Tensor):
        module.output_elements = getattr(module, "output_elements", 0) + output.numel()


def summed_elements(model: nn.Module) -> dict[str, int]:
    """M of every parameter's gradient, by the name of its row, once the model has run."""
    counts = {}
    for name, p in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        rows = p.shape[0] if p.dim() else 1
        counts[f"gradient of {name}"] = max(1, getattr(owner, "output_elements", 0) // max(1, rows))
    return counts


def moved_by_roundings(model: nn.Module, inputs: tuple) -> tuple[nn.Module, tuple]:
    """A copy of both whose numbers differ by a random share of a few roundings in float64."""
    random = torch.Generator().manual_seed(_SEED)
    relative = _ROUNDINGS * torch.finfo(torch.float64).eps / 2

    def move(x: Tensor) -> Tensor:
        share = 2 * torch.rand(x.shape, generator=random, dtype=torch.float64) - 1
        return x * (1 + relative * share.to(x.device))

    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(move(p))
    return model, map_floating(move, inputs)


def _leaves(inputs: tuple) -> list[Tensor]:
    return [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]


def tensors_of(model: nn.Module, inputs: tuple) -> list[Tensor]:
    inside = [*model.parameters(), *model.buffers()]
    return inside + _leaves(inputs)


def tested_dtype(model: nn.Module, inputs: tuple, devices: set[torch.device]) -> torch.dtype:
    """The coarsest dtype that the model computes in."""
    dtypes = {t.dtype for t in tensors_of(model, inputs) if t.is_floating_point()}
    autocast = [d.type for d in devices if torch.is_autocast_enabled(d.type)]
    dtypes |= {torch.get_autocast_dtype(kind) for kind in autocast}
    return max(dtypes or {torch.get_default_dtype()}, key=lambda d: torch.finfo(d).eps)


def map_floating(fn: Callable[[Tensor], Tensor], inputs: tuple) -> tuple:
    return tree_map_only(Tensor, lambda t: fn(t) if t.is_floating_point() else t, inputs)


def _leaf(t: Tensor, train: bool) -> Tensor:
    return t.detach().clone().requires_grad_(train and t.is_floating_point())
