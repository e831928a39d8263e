"""``python -m fusedres demo``."""

from .run import main

__all__ = ["main"]
