"""What ran, and how exact it was: ``explain``, ``verify`` and ``python -m fusedres doctor``."""

from .explain import Explanation, explain
from .verify import Verification, verify

__all__ = ["Explanation", "Verification", "explain", "verify"]
