"""What ran, how exact it was, how signals propagate: ``explain``, ``verify``, ``propagation``.

``python -m fusedres doctor`` is here too.
"""

from .explain import Explanation, explain
from .propagation import Propagation, propagation
from .verify import Verification, verify

__all__ = ["Explanation", "Propagation", "Verification", "explain", "propagation", "verify"]
