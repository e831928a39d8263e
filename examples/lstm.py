"""Trains LSTM cells with and without a forget gate to add two marked numbers of a sequence.

The adding problem (Hochreiter and Schmidhuber 1997, section 5.4): of random numbers two are marked,
and the answer is their sum. The state carries them over the gap because its shortcut is the
identity. ``--smoke`` takes three steps.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres


class Adder(nn.Module):
    def __init__(self, forget_gate: bool, hidden: int = 32):
        super().__init__()
        self.cell = fusedres.ResidualLSTMCell(2, hidden, forget_gate=forget_gate)
        self.head = nn.Linear(hidden, 1)

    def forward(self, xs: Tensor) -> Tensor:
        """[L, N, 2] -> [N]."""
        state = None
        for x in xs:
            state = self.cell(x, state)
        return self.head(state[0]).squeeze(1)


def batch_of(length: int, n: int = 64) -> tuple[Tensor, Tensor]:
    """Sequences [L, N, 2] of numbers and marks, one mark in each half; and the sums [N]."""
    numbers = torch.rand(length, n)
    marks = torch.zeros(length, n)
    half = length // 2
    marks[torch.randint(half, (n,)), torch.arange(n)] = 1
    marks[torch.randint(half, length, (n,)), torch.arange(n)] = 1
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--length", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="three steps only")
    args = parser.parse_args(argv)
    steps = 3 if args.smoke else args.steps
    for forget_gate in (True, False):
        torch.manual_seed(0)
        model = Adder(forget_gate)
        optimiser = torch.optim.Adam(model.parameters(), 5e-3)
        losses = []
        for _ in range(steps):
            xs, sums = batch_of(args.length)
            loss = F.mse_loss(model(xs), sums)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.item())
        name = "with a forget gate" if forget_gate else "c' = c + i*g"
        last = sum(losses[-20:]) / len(losses[-20:])
        print(f"{name}: squared error {last:.4f} after {steps} steps (always 1.0 gives 0.1667)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
