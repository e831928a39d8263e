"""The goals: the ratio to a peer, or the share of memory saved, that a row must reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

from .measure import Ratio, verdict
from .peers import (
    COMPILE,
    EAGER,
    EAGER_NCHW,
    FREEZING,
    MAX_AUTOTUNE,
    ONNXRUNTIME,
    OPENVINO,
    OURS,
    TENSORRT,
)


@dataclass(frozen=True)
class Goal:
    """For rows whose id fits ``rows``: the least that is wanted, and the aim.

    Args:
        memory: the figures are the share of the bytes saved for the backward that is gone.
    """

    rows: str
    peer: str
    at_least: float | None
    aim: float | None
    memory: bool = False


# For CPUs with bfloat16 convolutions (bf16), for any CPU (fp32), and for an H100 (cuda).
GOALS = (
    Goal("resnet50-inference-b8-bf16", EAGER, 2.0, 2.1),
    Goal("resnet50-inference-b8-bf16", FREEZING, None, 1.0),
    Goal("resnet50-inference-b8-bf16", OPENVINO, None, 1.0),
    Goal("resnet50-inference-b8-fp32", EAGER, 1.3, 1.5),
    Goal("resnet18-inference-b8-fp32", EAGER, 1.3, 1.8),
    Goal("resnet*-inference-b*-fp32", FREEZING, 0.95, 1.05),
    Goal("resnet*-inference-b*-fp32", OPENVINO, 0.9, 1.0),
    Goal("resnet*-inference-b*-fp32", ONNXRUNTIME, 1.0, 1.1),
    Goal("resnet50-training-b8-bf16", EAGER, 1.35, 1.55),
    Goal("resnet50-training-b8-bf16", COMPILE, 1.35, 1.55),
    Goal("resnet18-training-b16-bf16", EAGER, 1.25, 1.4),
    Goal("resnet18-training-b16-bf16", COMPILE, 1.25, 1.4),
    Goal("se_resnet50-training-b8-bf16", EAGER, 1.6, 1.9),
    Goal("se_resnet50-training-b8-bf16", COMPILE, 1.25, 1.45),
    Goal("*resnet*-training-b*-fp32", EAGER, 1.05, 1.25),
    Goal("*resnet*-training-b*-fp32", COMPILE, 1.0, 1.1),
    Goal("bn_act+residual-both-8x*x56x56-bf16", EAGER, 3.0, 4.0),
    Goal("squeeze_excite+residual-both-*-bf16", EAGER, 2.5, 3.0),
    Goal("*+residual-both-*-fp32", EAGER, 2.0, 2.5),
    Goal("*+residual-both-*-fp32", COMPILE, 1.0, 1.1),
    Goal("resnet50-training-b8-*", EAGER, 0.25, 0.40, memory=True),
    Goal("se_resnet50-training-b8-*", EAGER, 0.35, 0.50, memory=True),
    Goal("resnet50-training-b256-*16-cuda", EAGER_NCHW, 1.8, 2.3),
    Goal("resnet50-training-b256-*16-cuda", EAGER, 1.25, 1.6),
    Goal("resnet50-training-b256-*16-cuda", MAX_AUTOTUNE, 1.0, 1.2),
    Goal("se_resnet50-training-b256-*16-cuda", EAGER, 1.5, 1.9),
    Goal("se_resnet50-training-b256-*16-cuda", COMPILE, 1.1, 1.3),
    Goal("resnet18-training-b256-*16-cuda", EAGER, 1.2, 1.5),
    Goal("resnet18-training-b256-*16-cuda", COMPILE, 1.0, 1.15),
    Goal("resnet50-inference-b256-*16-cuda", EAGER, 2.0, 2.6),
    Goal("resnet50-inference-b256-*16-cuda", MAX_AUTOTUNE, 1.15, 1.4),
    Goal("resnet50-inference-b256-*16-cuda", TENSORRT, 0.9, 1.0),
    Goal("se_resnet50-inference-b256-*16-cuda", EAGER, 1.8, 2.2),
    Goal("se_resnet50-inference-b256-*16-cuda", COMPILE, 1.1, 1.3),
    Goal("se_resnet50-inference-b256-*16-cuda", TENSORRT, 1.0, 1.1),
    Goal("resnet50-training-b256-*16-cuda", EAGER, 0.15, 0.40, memory=True),
    Goal("se_resnet50-training-b256-*16-cuda", EAGER, 0.30, 0.50, memory=True),
)


@dataclass(frozen=True)
class Outcome:
    """A goal and what came; ``value`` is None where it was not measured."""

    goal: Goal
    value: float | None
    verdict: str


def outcomes(row: dict) -> Iterator[Outcome]:
    """Every goal that is set for a row, judged."""
    for goal in GOALS:
        if fnmatch(row["id"], goal.rows):
            yield _judge(goal, row)


def _judge(goal: Goal, row: dict) -> Outcome:
    if row["status"] != "measured":
        return Outcome(goal, None, "wrong result")
    peer = row["competitors"].get(goal.peer)
    if peer is None:
        reason = (row["missing"] | row["refused"]).get(goal.peer, "not run")
        return Outcome(goal, None, f"not measured: {reason}")
    if not goal.memory:
        found = Ratio(peer["ratio"], peer["halves"] and tuple(peer["halves"]))
        return Outcome(goal, found.value, verdict(found, goal.at_least, goal.aim))
    ours = row["competitors"][OURS]
    if ours["saved"] is None or not peer["saved"]:
        return Outcome(goal, None, "not measured")
    share = 1 - ours["saved"] / peer["saved"]
    # Both counts are exact: as a ratio with equal halves they go by the same words.
    exact = Ratio(1 + share, (1 + share,) * 2)
    return Outcome(goal, share, verdict(exact, 1 + goal.at_least, 1 + goal.aim))
