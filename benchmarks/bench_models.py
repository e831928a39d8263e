"""Whole networks: inference, the latency of one image among it, and training steps."""

from .suites import models, params

INFERENCE = (
    ("resnet18", 1), ("resnet18", 8), ("resnet50", 1), ("resnet50", 8),
    ("se_resnet18", 8), ("se_resnet50", 1), ("se_resnet50", 8),
)  # fmt: skip
TRAINING = (("resnet18", 16), ("resnet50", 8), ("se_resnet18", 16), ("se_resnet50", 8))
TABLE_INFERENCE = INFERENCE[:4]
TABLE_TRAINING = (("resnet18", 16), ("resnet50", 8), ("se_resnet50", 8))


@params(models("inference", INFERENCE, smoke=(("resnet18", 1),), table=TABLE_INFERENCE))
def test_inference(race, spec):
    race(spec)


@params(models("training", (("resnet18", 2), *TRAINING), (("resnet18", 2),), TABLE_TRAINING))
def test_training(race, spec):
    race(spec)
