"""The form in which a library's file tells how the modules of one class are to run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..blocks.recognise import SE


def _always(module: nn.Module) -> bool:
    return True


@dataclass(frozen=True, eq=False)
class Recipe:
    """How the modules of one class run on fused ops (or, for this library's own, without them).

    Args:
        peer: the class, as ``package.module.Class``; looked up when asked for, never imported.
        reads: the names that the peer's own method uses, in the order of first use. A release of
            the peer whose method uses others is one that this recipe has not read: its modules
            stay as they are.
        forward: what replaces that method.
        method: the replaced method, where it is not ``forward``.
        also: further methods of the peer that a subclass must not have overridden.
        suits: whether this one instance can be fused; for a squeeze-excite, ``se`` decides.
        members: the modules that a purely sequential peer applies one after the other.
        se: a squeeze-excite peer's layers, or the reason the fused op cannot compute it.
        own_act: the activation behind the norm in a norm's module; None where the ops have none.
        arguments: whether ``forward`` takes all arguments of the method, not one tensor alone.
    """

    peer: str
    reads: str | None
    forward: Callable[..., Tensor]
    method: str = "forward"
    also: tuple[str, ...] = ()
    suits: Callable[[nn.Module], bool] = _always
    members: Callable[[nn.Module], Sequence[nn.Module | None]] | None = None
    se: Callable[[nn.Module], SE | str] | None = None
    own_act: Callable[[nn.Module], str | None] | None = None
    arguments: bool = False

    def replaces(self, kind: type) -> bool:
        """Whether instances of ``kind`` run exactly the code that this recipe replaces."""
        peer = loaded(self.peer)
        if peer is None or not issubclass(kind, peer):
            return False
        names = {"forward", self.method, *self.also}
        if any(getattr(kind, name) is not getattr(peer, name) for name in names):
            return False
        return self.reads in (None, names_read(getattr(peer, self.method)))

    def accepts(self, module: nn.Module) -> bool:
        """Whether this instance, of a class that the recipe replaces, can run it."""
        if "forward" in vars(module) or not self.suits(module):
            return False
        return self.se is None or isinstance(self.se(module), SE)


def loaded(peer: str) -> type | None:
    """The class called ``package.module.Class`` if its module has been imported, else None.

    A model of a library cannot exist unless somebody imported that library, so nothing is missed.
    """
    module, name = peer.rsplit(".", 1)
    return getattr(sys.modules.get(module), name, None)


def names_read(function: Callable) -> str:
    code = getattr(function, "__code__", None)
    return " ".join(code.co_names) if code is not None else ""


def recipe_of(module: object) -> Recipe | None:
    """The recipe that a module of an exchanged class runs, None for everything else."""
    return getattr(type(module), "fusedres_recipe", None)
