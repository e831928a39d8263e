"""The demo: its data, its plain blocks, its rulers, its verdict, and one whole run."""

from __future__ import annotations

import copy
import importlib.util
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedres
from fusedres import demo
from fusedres.demo import measure, plots, run, tables, traffic
from fusedres.demo.networks import PlainBasicBlock, PlainSEBasicBlock


@pytest.fixture(scope="module")
def images() -> measure.Images:
    return measure.load_images()


def test_the_split_is_fixed_and_fair(images: measure.Images):
    assert images.train_x.shape == (1437, 1, 16, 16)
    assert images.test_x.shape == (360, 1, 16, 16)
    again = measure.load_images()
    assert all(
        torch.equal(a, b) for a, b in zip(vars(images).values(), vars(again).values(), strict=True)
    )
    for y in (images.train_y, images.test_y):
        share = torch.bincount(y, minlength=10) / len(y)
        assert share.min() > 0.09 and share.max() < 0.11
    train = {x.numpy().tobytes() for x in images.train_x}
    assert not any(x.numpy().tobytes() in train for x in images.test_x)


def test_the_plain_block_is_torchvisions():
    resnet = pytest.importorskip("torchvision.models.resnet")
    downsample = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
    theirs = resnet.BasicBlock(4, 6, 2, downsample)
    ours = PlainBasicBlock(4, 6, 2, copy.deepcopy(downsample))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 4, 7, 7)
    assert torch.equal(ours(x), theirs(x))


def test_the_plain_se_block_has_the_fused_blocks_parameters():
    plain, fused = PlainSEBasicBlock(32, 32), fusedres.SEBasicBlock(32, 32)
    assert [(k, v.shape) for k, v in plain.state_dict().items()] == [
        (k, v.shape) for k, v in fused.state_dict().items()
    ]


def test_one_seed_gives_one_training(images: measure.Images):
    def losses(seed: int) -> list[float]:
        model = run.networks(0)[0]
        training = measure.Training(model, images, steps=50, batch=16, seed=seed)
        return [training.step() for _ in range(3)]

    first = losses(seed=1)
    assert losses(seed=1) == first
    assert losses(seed=2) != first


def test_the_first_steps_agree(images: measure.Images):
    steps = []
    first = measure.compare_first_steps(*run.networks(0), images, 0, lambda: steps.append(1))
    assert len(steps) == 4 * measure.FIRST_STEPS
    assert first.ok, first


def _another_eps(model: nn.Module) -> None:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps *= 1.001


def _another_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.fc.bias[0] += 1e-6


@pytest.mark.parametrize("spoil", [_another_eps, _another_weight])
def test_a_slight_mistake_is_caught(spoil: Callable, images: measure.Images):
    plain, wrong = run.networks(0)[0], run.networks(0)[0]
    spoil(wrong)
    assert not measure.compare_first_steps(plain, wrong, images, 0, lambda: None).ok


def test_inference_is_compared_with_float64(images: measure.Images):
    plain, fused = run.networks(0)
    same = run.compare_inference(plain, fused, images)
    assert same.fused_error <= same.allowed
    with torch.no_grad():
        fused.fc.bias[0] += 1e-4
    wrong = run.compare_inference(plain, fused, images)
    assert wrong.fused_error > wrong.allowed == same.allowed


class _Toy(nn.Module):
    """conv, ReLU, linear: everything about it can be counted by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.fc = nn.Linear(2 * 4 * 4, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def test_saved_memory_counts_each_storage_once():
    x, y = torch.randn(5, 1, 4, 4), torch.zeros(5, dtype=torch.long)
    # relu and fc both keep the ReLU's result, once; cross entropy keeps its log-softmax and a sum.
    kept = measure.saved_for_backward(_Toy(), x, y)
    activation, log_softmax = 4 * 5 * 2 * 4 * 4, 4 * 5 * 3
    assert activation + log_softmax <= kept <= activation + log_softmax + 8


def test_traffic_counts_reads_and_writes_of_activations():
    x, y = torch.randn(5, 1, 4, 4), torch.zeros(5, dtype=torch.long)
    counted = traffic.training_traffic(_Toy(), x, y)
    # conv reads x and writes h; ReLU reads h and writes a; ReLU's backward reads da and a and
    # writes dh; conv's backward reads x and dh.
    image, activation = 4 * 5 * 4 * 4, 4 * 5 * 2 * 4 * 4
    assert counted == traffic.Traffic(kernels=4, bytes=2 * image + (1 + 2 + 3 + 1) * activation)


def test_fused_blocks_move_and_keep_less():
    x, y = torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.long)
    x = measure.channels_last(x)
    plain, fused = (m.train() for m in run.networks(0))
    assert measure.saved_for_backward(fused, x, y) < measure.saved_for_backward(plain, x, y)
    ours, theirs = traffic.training_traffic(fused, x, y), traffic.training_traffic(plain, x, y)
    assert ours.bytes < theirs.bytes
    assert ours.kernels < theirs.kernels
    with fusedres.backend("reference"):  # the reference is PyTorch's own operators: no gain
        reference = traffic.training_traffic(fused, x, y)
    assert reference.kernels >= theirs.kernels


def test_medians_interleave():
    calls: list[str] = []
    turns = [lambda: calls.append("a"), lambda: calls.append("b")]
    rounds = []
    times = measure.median_seconds(turns, 4, lambda: rounds.append(len(calls)))
    assert len(times) == 2 and min(times) >= 0
    assert rounds == [2 * (i + 1) for i in range(measure.all_rounds(4))]
    assert calls == ["b", "a", "a", "b"] * 3


def _verdict(accuracies=(0.98, 0.99), exact=True, inference_error=1e-7) -> tuple[int, str]:
    from rich.console import Console

    error = measure.Error(1e-14, 1e-14)
    allowed = measure.Error(1e-12, 1e-12 if exact else 1e-15)
    first = measure.FirstSteps(error, error, error, allowed)
    text = io.StringIO()
    inference = run.Inference(1e-7, inference_error, allowed=2e-7)
    code = tables.verdict(Console(file=text, width=200), accuracies, 0.97, first, inference)
    return code, text.getvalue()


def test_the_verdict_is_the_exit_code():
    code, text = _verdict()
    assert code == 0 and text.count("PASS") == 3
    for fault in ({"accuracies": (0.99, 0.96)}, {"exact": False}, {"inference_error": 1e-6}):
        code, text = _verdict(**fault)
        assert code == 1 and text.count("FAIL") == 1


def test_a_missing_package_is_named(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    absent = lambda name, *a: None if name == "sklearn" else find_spec(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    assert demo.main([]) == 2
    assert "scikit-learn: pip install 'fusedres[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "--epochs: wanted at least 1, got 0"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    assert demo.main(["--out", str(tmp_path / "file" / "folder")]) == 2
    assert "--out: cannot make the folder" in capsys.readouterr().err


def test_stages_on_a_terminal_are_bars():
    from rich.console import Console

    from fusedres.demo.stages import Stages

    text = io.StringIO()
    with Stages(Console(file=text, force_terminal=True, width=100)) as stages:
        step = stages.begin("training", 2)
        step("loss 2.0")
        step()
        stages.begin("timing", 3)("half")
    assert "2/2" in text.getvalue() and "1/3" in text.getvalue() and "half" in text.getvalue()
    assert "training: 2 steps" not in text.getvalue()


def _drawn_colours(png: Path) -> set[tuple[int, ...]]:
    from PIL import Image

    return {colour for _, colour in Image.open(png).convert("RGB").getcolors(maxcolors=2**24)}


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(run, "ROUNDS", 3)
    code = demo.main(["--device", "cpu", "--epochs", "4", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert code == 0, text
    assert text.count("PASS") == 3
    for stage in ("exactness, float64: 32", "plain PyTorch blocks: 44", "timing, taking turns: 10"):
        assert f"{stage} steps\n" in text  # no terminal: a line a stage
    accuracies = [float(a) for a in re.findall(r"(\d+\.\d+)%", text)]
    assert len(accuracies) == 2 and min(accuracies) >= 97
    for chart in ("loss_curves.png", "speed.png"):
        assert {_rgb(plots.PLAIN), _rgb(plots.FUSED)} <= _drawn_colours(tmp_path / chart)
        assert str(tmp_path / chart) in text.replace("\n", "")
    state = torch.load(tmp_path / "plain.pt", weights_only=True)
    run.networks(0)[0].load_state_dict(state, strict=True)


@pytest.mark.gpu
def test_a_run_on_the_gpu(tmp_path: Path):
    assert demo.main(["--device", "cuda", "--epochs", "6", "--out", str(tmp_path)]) == 0
