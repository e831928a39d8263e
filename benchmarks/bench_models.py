"""Whole networks. FULL=1 adds every row of the table of goals (``benchmarks.table``)."""

import pytest
import torch

from .model_cases import inference_case, network, training_case
from .selection import full, select
from .table import ROWS, Scale

SIZE = 224
INFERENCE = select([("resnet18", 2)], [("resnet50", 1), ("resnet18", 8)])
TABLE = [row for row in ROWS if row.case is not None]


@pytest.mark.parametrize("name, batch", INFERENCE)
def test_inference(race, name, batch):
    race(inference_case(network(name, batch, SIZE), torch.float32))


def test_training(race):
    race(training_case(network("resnet18", 2, SIZE), torch.float32, compiled=full()))


@pytest.mark.parametrize("row", select([], TABLE), ids=lambda row: row.id)
def test_table(race, row):
    race(row.case(Scale()))
