"""The table of goals: each row's work, its peers, and the ratios it must reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import model_cases, op_cases
from .cases import Case, Memory
from .peers import COMPILE, EAGER, FREEZING, OPENVINO

FP32, BF16 = torch.float32, torch.bfloat16
TABLE = "the table of goals"  # the project's own goals, for CPUs with bfloat16 convolutions
GENERAL = "the general CPU goals"  # must and goal, for any dtype


@dataclass(frozen=True)
class Scale:
    """Sizes: the table's own, or tiny ones that only try out the harness."""

    quick: bool = False

    @property
    def image(self) -> int:
        return 64 if self.quick else 224

    def batch(self, batch: int) -> int:
        return 2 if self.quick else batch

    def activation(self, channels: int, size: int) -> tuple[int, ...]:
        size = min(size, 14) if self.quick else size
        return (self.batch(8), channels, size, size)


@dataclass(frozen=True)
class Goal:
    """A ratio to one peer: the least that is wanted, and the aim. For memory: shares saved."""

    peer: str
    at_least: float | None
    aim: float | None


@dataclass(frozen=True)
class Row:
    """One line of the table; exactly one of ``case`` (timed) and ``memory`` is given."""

    id: str
    goals: tuple[Goal, ...]
    source: str
    case: Callable[[Scale], Case] | None = None
    memory: Callable[[Scale], dict[str, Memory]] | None = None


def _name(dtype: torch.dtype) -> str:
    return "fp32" if dtype == FP32 else "bf16"


def _network(name: str, batch: int, scale: Scale) -> model_cases.Work:
    return model_cases.network(name, scale.batch(batch), scale.image)


def _inference(dtype: torch.dtype, *goals: Goal) -> Row:
    def case(scale: Scale) -> Case:
        work = _network("resnet50", 8, scale)
        return model_cases.inference_case(work, dtype, compiled=not scale.quick)

    return Row(f"resnet50-inference-{_name(dtype)}", goals, TABLE, case)


def _training(name: str, batch: int, dtype: torch.dtype, source: str, *goals: Goal) -> Row:
    def case(scale: Scale) -> Case:
        work = _network(name, batch, scale)
        return model_cases.training_case(work, dtype, compiled=not scale.quick)

    return Row(f"{name}-training-{_name(dtype)}", goals, source, case)


def _op(stem: str, channels: int, size: int, dtype: torch.dtype, source: str, *goals: Goal) -> Row:
    def case(scale: Scale) -> Case:
        op = op_cases.OPS[f"{stem} + residual"]
        shape = scale.activation(channels, size)
        return op_cases.case(op, shape, dtype, compiled=not scale.quick)

    return Row(f"{stem}-{channels}x{size}x{size}-{_name(dtype)}", goals, source, case)


def _memory(name: str, dtype: torch.dtype, at_least: float, aim: float) -> Row:
    def memory(scale: Scale) -> dict[str, Memory]:
        return model_cases.memory_of_training(_network(name, 8, scale), dtype)

    goal = Goal(EAGER, at_least, aim)
    return Row(f"{name}-memory-{_name(dtype)}", (goal,), TABLE, memory=memory)


def _op_rows(stem: str, shapes, dtype: torch.dtype, source: str, *goals: Goal) -> list[Row]:
    return [_op(stem, *shape, dtype, source, *goals) for shape in shapes]


_BN_SHAPES = ((64, 56), (256, 56))
_SE_SHAPES = ((256, 56), (1024, 14))  # stages 1 and 3 of SE-ResNet-50
_GENERAL_TRAINING = Goal(EAGER, 1.05, 1.25), Goal(COMPILE, 1.0, 1.1)
_GENERAL_OP = Goal(EAGER, 2.0, 2.5), Goal(COMPILE, 1.0, 1.1)
_RN50, _RN18 = ("resnet50", 8), ("resnet18", 16)

# The cheap rows first: where bfloat16 convolutions are slow, the last ones take many minutes.
ROWS: tuple[Row, ...] = (
    *_op_rows("bn_act", _BN_SHAPES, FP32, GENERAL, *_GENERAL_OP),
    *_op_rows("bn_act", _BN_SHAPES, BF16, TABLE, Goal(EAGER, 3.0, 4.0)),
    *_op_rows("squeeze_excite", _SE_SHAPES, FP32, GENERAL, *_GENERAL_OP),
    *_op_rows("squeeze_excite", _SE_SHAPES, BF16, TABLE, Goal(EAGER, 2.5, 3.0)),
    _memory("resnet50", FP32, 0.25, 0.40),
    _memory("se_resnet50", FP32, 0.35, 0.50),
    _inference(FP32, Goal(EAGER, 1.3, 1.5)),
    _training(*_RN18, FP32, GENERAL, *_GENERAL_TRAINING),
    _training(*_RN50, FP32, GENERAL, *_GENERAL_TRAINING),
    _training("se_resnet50", 8, FP32, GENERAL, *_GENERAL_TRAINING),
    _inference(BF16, Goal(EAGER, 2.0, 2.1), Goal(FREEZING, None, 1.0), Goal(OPENVINO, None, 1.0)),
    _training(*_RN18, BF16, TABLE, Goal(EAGER, 1.25, 1.4), Goal(COMPILE, 1.25, 1.4)),
    _training(*_RN50, BF16, TABLE, Goal(EAGER, 1.35, 1.55), Goal(COMPILE, 1.35, 1.55)),
    _training("se_resnet50", 8, BF16, TABLE, Goal(EAGER, 1.6, 1.9), Goal(COMPILE, 1.25, 1.45)),
    _memory("resnet50", BF16, 0.25, 0.40),
    _memory("se_resnet50", BF16, 0.35, 0.50),
)
