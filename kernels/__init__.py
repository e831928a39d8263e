"""Triton kernels, installed as ``fusedres.kernels``. They are not part of this version.

``kernels`` is the name of another package, so this folder refuses to be imported under it.
"""

if __name__ != "fusedres.kernels":
    raise ImportError(f"this folder is the package fusedres.kernels, not {__name__!r}")
