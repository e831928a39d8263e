"""One residual block under ``propagation``: hooks that see what goes in, through and out of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

SHORTCUTS = ("downsample", "shortcut", "proj", "skip", "identity")
ROUNDINGS = 8.0  # of the largest norm that a sum is made of, for each term


@dataclass(frozen=True)
class Block:
    """One residual block. Norms are L2; a figure that the block does not have is None.

    ``kind``: "identity" (y = x + F), "projection" (y = s(x) + F), "post-activation"
    (y = act(s(x) + F)), or "other": F is then the difference of output and shortcut.
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
    f: Tensor | None = None  # the branch's result, where a module returned it
    results: list[Tensor] = field(default_factory=list)

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
            if path.partition(".")[0] not in SHORTCUTS:
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
        if self.entry is not None or not args or args[0] is not self.x:
            return None
        self.entry = _watched(args[0])
        return self.entry.clone(), *args[1:]

    def _result(self, out):
        if not isinstance(out, Tensor) or not out.requires_grad:
            return None
        self.results.append(_watched(out))
        return self.results[-1].clone()

    def _shortcut(self, out) -> None:
        if isinstance(out, Tensor):
            self.shortcut = out.detach().clone()

    def _leave(self, y) -> None:
        if isinstance(y, Tensor):
            self.y = y.detach().clone()

    def block(self, name: str) -> Block:
        x = self.x.detach()
        identity = self.shortcut is None
        shortcut = x if identity else self.shortcut
        branch, kind = self._branch(shortcut, identity)
        self.f, sums = branch, kind == "identity"
        if branch is not None:
            f = branch.detach()
        else:
            f = self.y - shortcut if self.y.shape == shortcut.shape else self.y
        return Block(
            name, kind, norm(x), norm(f), norm(self.x.grad),
            None if branch is None else norm(branch.grad),
            relative(self.y - (x + f), self.y) if sums else None,
            self._backward_error(branch) if sums else None,
        )  # fmt: skip

    def _branch(self, shortcut: Tensor, identity: bool) -> tuple[Tensor | None, str]:
        """The module result that the shortcut is added to, and what that makes of the block."""
        for out in reversed(self.results):
            if out.shape != self.y.shape or shortcut.shape != self.y.shape:
                continue
            total = shortcut + out.detach()
            allowed = tolerance(self.y, 2, norm(shortcut), norm(out))
            if relative(self.y - total, self.y) <= allowed:
                return out, "identity" if identity else "projection"
            if relative(self.y - total.relu(), self.y) <= allowed:
                return out, "post-activation"
        return None, "other"

    def _backward_error(self, branch: Tensor) -> float | None:
        """``dx = dy + dF/dx * dy``: dy is what arrives at the branch's end, which was added."""
        if self.entry is None or self.entry.grad is None or branch.grad is None:
            return None
        total = branch.grad + self.entry.grad
        return relative(self.x.grad - total, self.x.grad)


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
