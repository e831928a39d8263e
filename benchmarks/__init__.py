"""Benchmarks: every figure from one process, competitors taking turns, results checked first.

``pytest benchmarks --benchmark-only`` runs a small selection of every suite, with FULL=1 all of it.
``python -m benchmarks.run_table`` measures the table of goals and writes JSON.
"""
