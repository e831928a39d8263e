"""What the demo trains and measures; nothing here prints."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 128
LEARNING_RATE = 0.1
FIRST_STEPS = 8
FIRST_BATCH = 32
WARM_UP = 2  # rounds that fill caches and pick algorithms


@dataclass(frozen=True)
class Images:
    """Images [N, 1, 16, 16] and labels [N] of the training and the test set."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device) -> Images:
        return Images(*(t.to(device) for t in vars(self).values()))


def load_images() -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8, scaled up to 16x16; 360 are for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    x = F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
    y = torch.from_numpy(digits.target)
    rows = range(len(y))
    train, test = train_test_split(rows, test_size=360, random_state=0, stratify=digits.target)
    mean, std = x[train].mean(), x[train].std()
    x = (x - mean) / std
    return Images(x[train], y[train], x[test], y[test])


class Training:
    """SGD with momentum on a one-cycle schedule; the same batches for the same seed."""

    def __init__(self, model: nn.Module, images: Images, *, steps: int, batch: int, seed: int):
        self.model = model.train()
        self.dtype = next(model.parameters()).dtype
        self.images, self.batch = images, batch
        self.order = torch.Generator().manual_seed(seed)
        self.queue: list[Tensor] = []
        self.optimizer = torch.optim.SGD(
            model.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=steps
        )

    def step(self) -> float:
        """One step on the next batch; returns its loss."""
        if not self.queue:
            count = len(self.images.train_y)
            shuffled = torch.randperm(count, generator=self.order)
            self.queue = list(shuffled[: count - count % self.batch].split(self.batch))
        picked = self.queue.pop(0).to(self.images.train_x.device)
        x = channels_last(self.images.train_x[picked].to(self.dtype))
        loss = update(self.model, self.optimizer, x, self.images.train_y[picked])
        self.schedule.step()
        return loss.item()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def steps_per_epoch(images: Images) -> int:
    return len(images.train_y) // BATCH


def update(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def accuracy(model: nn.Module, images: Images) -> float:
    """The share of the test images that the model names rightly; the model is left in eval mode."""
    model.eval()
    with torch.no_grad():
        named = model(channels_last(images.test_x)).argmax(1)
    return (named == images.test_y).double().mean().item()


def largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True)))


@dataclass(frozen=True)
class Error:
    """Largest differences over the first steps of a training: of the loss, and of any weight."""

    loss: float
    weight: float


@dataclass(frozen=True)
class FirstSteps:
    """How three executions leave plain PyTorch in float64, and the most that is allowed."""

    plain32: Error
    fused32: Error
    fused64: Error
    allowed64: Error

    @property
    def ok(self) -> bool:
        fused, allowed = self.fused64, self.allowed64
        return fused.loss <= allowed.loss and fused.weight <= allowed.weight


def compare_first_steps(
    plain: nn.Module, fused: nn.Module, images: Images, seed: int, on_step: Callable[[], None]
) -> FirstSteps:
    """Train copies of both models for a few steps in float32 and in float64.

    The allowed difference of the float64 runs is what rounding explains: the difference that
    PyTorch's own float32 run shows against its float64 run, times the ratio of the two roundings,
    plus one rounding of the largest value a step.
    """

    def follow(model: nn.Module, dtype: torch.dtype) -> tuple[list[float], list[Tensor]]:
        model = copy.deepcopy(model).to(dtype)
        training = Training(model, images, steps=10 * FIRST_STEPS, batch=FIRST_BATCH, seed=seed)
        losses = []
        for _ in range(FIRST_STEPS):
            losses.append(training.step())
            on_step()
        return losses, [p.detach() for p in model.parameters()]

    losses, weights = follow(plain, torch.float64)

    def error(model: nn.Module, dtype: torch.dtype) -> Error:
        other_losses, other_weights = follow(model, dtype)
        loss = max(abs(a - b) for a, b in zip(losses, other_losses, strict=True))
        return Error(loss, largest_difference(weights, other_weights))

    plain32 = error(plain, torch.float32)
    eps32, eps64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
    largest_weight = max(w.abs().max().item() for w in weights)
    allowed = Error(
        plain32.loss * eps64 / eps32 + FIRST_STEPS * eps64 * max(losses),
        plain32.weight * eps64 / eps32 + FIRST_STEPS * eps64 * largest_weight,
    )
    fused32, fused64 = error(fused, torch.float32), error(fused, torch.float64)
    return FirstSteps(plain32, fused32, fused64, allowed)


def all_rounds(rounds: int) -> int:
    """The first ones included, which are not timed."""
    return WARM_UP + rounds


def median_seconds(
    calls: Sequence[Callable[[], object]], rounds: int, on_round: Callable[[], None]
) -> list[float]:
    """The median time of each call, the calls taking turns so that both meet the same machine."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(all_rounds(rounds)):
        order = list(enumerate(calls))
        for index, call in order if round_ % 2 else reversed(order):
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            if round_ >= WARM_UP:
                times[index].append(time.perf_counter() - start)
        on_round()
    return [statistics.median(t) for t in times]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def training_call(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A call that makes one training step on a copy of the model."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    return lambda: update(model, optimizer, x, y)


def inference_call(model: nn.Module, x: Tensor) -> Callable[[], object]:
    model.eval()

    def call() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return call


def saved_for_backward(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes that one forward in training keeps for the backward, without the model and its input.

    A storage that several tensors share counts once.
    """
    model = copy.deepcopy(model).train()
    known = {t.untyped_storage().data_ptr() for t in (x, y, *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(x), y)
    total = sum(kept.values())
    loss.backward()  # the graph, and so each storage, has lived until here: no address came twice
    return total


def peak_cuda_bytes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """The most memory that one training step has allocated at a time on the GPU."""
    step = training_call(model, x, y)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()
