"""Benchmarks: every figure from one process, competitors taking turns, results checked first.

``pytest benchmarks --benchmark-only`` (or ``python -m fusedres bench``) runs the smoke selection,
``--suite table`` the work that goals are set for, ``--suite full`` everything. Results are JSON:
``python -m benchmarks.report`` shows them, ``python -m benchmarks.compare`` compares two of them,
``python -m benchmarks.roofline`` says what the passes over memory allow.
"""
