"""``fuse`` and ``unfuse``: other libraries' residual networks on fused ops, and back.

A fused module keeps its identity (class, parameters, state dict, hooks); only the method that runs
it is replaced, by a subclass made for it. ``recognise`` says which modules, one file a library
holds how each of them runs, ``swap`` exchanges the classes.
"""

from .swap import fuse, unfuse

__all__ = ["fuse", "unfuse"]
