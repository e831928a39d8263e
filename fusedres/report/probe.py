"""One residual block under ``propagation``: hooks that see what goes in, through and out of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..blocks import ResidualScale
from ..reference import ACTIVATIONS

SHORTCUTS = ("downsample", "shortcut", "proj", "skip", "identity")
ROUNDINGS = 8.0  # of the largest norm that a sum is made of, for each term


@dataclass(frozen=True)
class Block:
    """One residual block. Norms are L2; a figure that the block does not have is None.

    ``kind``: "identity" (y = x + F), "projection" (y = s(x) + F), "post-activation"
    (y = act(s(x) + F)), "concatenation" (y = [x, F], as a dense block's), or "other": F is then the
    difference of output and shortcut. The F of a block that adds twice, as a pre-norm transformer
    layer, is the sum of both. |dF| is the gradient that arrives at F, where the block adds last.
    """

    name: str
    kind: str
    x: float
    f: float
    dx: float
    df: float | None
    forward_error: float | None
    backward_error: float | None


@dataclass
class Probe:
    """Watches one block: what goes in and out, what its branch returns, and all gradients."""

    module: nn.Module
    x: Tensor | None = None
    y: Tensor | None = None
    shortcut: Tensor | None = None
    entry: Tensor | None = None  # x as the branch's first module got it
    middle: tuple[Tensor, Tensor] | None = None  # a result r, and x + r as a module got it
    parts: tuple[Tensor, ...] = ()  # the results that add up to F, in the order they were added
    results: list[Tensor] = field(default_factory=list)
    longer: Tensor | None = None  # the result of a block that keeps x in its first channels

    @property
    def f(self) -> Tensor:
        return sum(part.detach() for part in self.parts)

    @property
    def arriving(self) -> Tensor:
        """The gradient at the last addition."""
        return self.parts[-1].grad

    @property
    def through(self) -> Tensor | None:
        """The gradient that came through the branches, at their modules that read x."""
        entries = [self.entry, *([self.middle[1]] if len(self.parts) > 1 else [])]
        grads = [None if t is None else t.grad for t in entries]
        return None if any(g is None for g in grads) else sum(grads)

    @contextlib.contextmanager
    def watching(self, name: str, order: list[str]) -> Iterator[None]:
        inner = [
            (path, m) for path, m in self.module.named_modules()
            if path and next(m.children(), None) is None
        ]  # fmt: skip
        shortcuts = [m for n, m in self.module.named_children() if n in SHORTCUTS]
        handles = [
            self.module.register_forward_pre_hook(lambda m, args: self._enter(args, name, order)),
            self.module.register_forward_hook(lambda m, args, y: self._leave(y)),
            *(m.register_forward_hook(lambda m, args, s: self._shortcut(s)) for m in shortcuts),
        ]
        for path, m in inner:
            if isinstance(m, ResidualScale):
                handles.append(m.register_forward_hook(self._scaled))
            elif path.partition(".")[0] not in SHORTCUTS:
                handles.append(m.register_forward_pre_hook(lambda m, args: self._begin(args)))
                handles.append(m.register_forward_hook(lambda m, args, out: self._result(out)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, args: tuple, name: str, order: list[str]):
        if not args or not isinstance(args[0], Tensor):
            return None
        order.append(name)
        # A copy of its own, so that no module's work in place reaches what is measured.
        self.x = _watched(args[0])
        return self.x, *args[1:]

    def _begin(self, args: tuple):
        if not args or not isinstance(args[0], Tensor) or self.x is None:
            return None
        if args[0] is self.x and self.entry is None:
            copy = self.entry = _watched(args[0])
        elif (first := self._added_to_x(args[0])) is not None:
            copy = _watched(args[0])
            self.middle = first, copy
        else:
            return None
        return copy.clone(), *args[1:]

    def _added_to_x(self, y: Tensor) -> Tensor | None:
        """The result r for which y is x + r, once."""
        if self.middle is not None or y.shape != self.x.shape:
            return None
        for r in reversed(self.results):
            if r.shape == y.shape and _is_sum(y.detach(), self.x.detach(), r.detach()):
                return r
        return None

    def _scaled(self, module: ResidualScale, args: tuple, out: Tensor) -> Tensor:
        """The module adds: what is added is the branch times its weight."""
        branch, x, scale, act, *_ = *args, *(None, "identity")[len(args) - 2 :]
        f = module.of_branch(branch)
        if scale is not None:
            f = f * scale.to(f.dtype).view(-1, *[1] * (f.dim() - 1))
        self.results.append(_watched(f))
        if module.shortcut != 1:
            self._shortcut(x * module.shortcut)
        return ACTIVATIONS[act](self.results[-1].clone() + x * module.shortcut)

    def _result(self, out):
        if not isinstance(out, Tensor) or not out.requires_grad:
            return None
        self.results.append(_watched(out))
        return self.results[-1].clone()

    def _shortcut(self, out) -> None:
        if isinstance(out, Tensor):
            self.shortcut = out.detach().clone()

    def _leave(self, y) -> Tensor | None:
        if not isinstance(y, Tensor) or self.x is None:
            return None
        self.y, x, self.longer = y.detach().clone(), self.x.detach(), None
        if y.dim() == x.dim() > 1 and y.shape[1] > x.shape[1] and y.requires_grad:
            kept, new = self.y[:, : x.shape[1]], self.y[:, x.shape[1] :]
            if torch.equal(kept, x) and new.any():  # else zeros fill up a shortcut
                self.longer = _watched(y)
                return self.longer.clone()
        return None

    def block(self, name: str) -> Block:
        x = self.x.detach()
        if self.longer is not None:
            new, grad = slice(x.shape[1], None), self.longer.grad
            df = None if grad is None else norm(grad[:, new])
            norms = norm(x), norm(self.y[:, new]), norm(self.x.grad), df
            return Block(name, "concatenation", *norms, None, None)
        identity = self.shortcut is None or torch.equal(self.shortcut, x)
        shortcut = x if identity else self.shortcut
        self.parts, kind = self._branch(shortcut, identity)
        sums = kind == "identity"
        if self.parts:
            f = self.f
        else:
            f = self.y - shortcut if self.y.shape == shortcut.shape else self.y
        return Block(
            name, kind, norm(x), norm(f), norm(self.x.grad),
            norm(self.arriving) if self.parts else None,
            relative(self.y - (x + f), self.y) if sums else None,
            self._backward_error() if sums else None,
        )  # fmt: skip

    def _branch(self, shortcut: Tensor, identity: bool) -> tuple[tuple[Tensor, ...], str]:
        """The results that the shortcut is added to, and what that makes of the block."""
        fitting = [r for r in reversed(self.results) if r.shape == self.y.shape == shortcut.shape]
        for out in fitting:
            if _is_sum(self.y, shortcut, out.detach()):
                return (out,), "identity" if identity else "projection"
            if _is_sum(self.y, shortcut, out.detach(), relu=True):
                return (out,), "post-activation"
        for out in fitting if identity and self.middle is not None else ():
            if _is_sum(self.y, shortcut, self.middle[0].detach(), out.detach()):
                return (self.middle[0], out), "identity"
        return (), "other"

    def _backward_error(self) -> float | None:
        """``dx = dy + dF/dx * dy``: dy is what arrives at the branch's end, which was added."""
        through = self.through
        if through is None or self.arriving is None:
            return None
        return relative(self.x.grad - (self.arriving + through), self.x.grad)


def _is_sum(y: Tensor, *terms: Tensor, relu: bool = False) -> bool:
    total = sum(terms)
    allowed = tolerance(y, len(terms), *map(norm, terms))
    return relative(y - (total.relu() if relu else total), y) <= allowed


def _watched(x: Tensor) -> Tensor:
    """A copy whose gradient is kept."""
    x = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
    x.retain_grad()
    return x


def norm(x: Tensor | None) -> float:
    return 0.0 if x is None else x.detach().double().norm().item()


def relative(difference: Tensor, whole: Tensor) -> float:
    return norm(difference) / (norm(whole) or 1.0)


def tolerance(whole: Tensor, terms: int, *norms: float) -> float:
    """What the roundings of a sum of ``terms`` may be of its result, relative."""
    largest = max(1.0, *(n / (norm(whole) or 1.0) for n in norms))
    return ROUNDINGS * terms**0.5 * torch.finfo(whole.dtype).eps * largest
