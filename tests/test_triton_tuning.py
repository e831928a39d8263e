"""The measured choice of a configuration, with a timer that says what the test wants."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

import fusedres
import test_bn_act as bn
import test_bn_se_act as bn_se
import test_residual_mix as mix
from fusedres import triton_kernels
from harness import Unchanged
from triton_cases import triton_on

triton = pytest.importorskip("triton")
launch = triton_kernels.package().module("launch")
tuning = triton_kernels.package().module("tuning")

Config = launch.Config
CONFIGS = Config(4096, 64, 4), Config(2048, 64, 4), Config(8192, 128, 8)
GPU = "NVIDIA Test 1000 (80GB)"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSEDRES_TUNE", raising=False)
    monkeypatch.setattr(tuning, "_caches", {})
    return tmp_path / "cache"


def forget() -> None:
    """What a new process knows: nothing but the file."""
    tuning._caches.clear()


class Timer:
    """Runs what it is given; ``fastest`` is the configuration that takes the least time."""

    def __init__(self, fastest: int):
        self.fastest = fastest
        self.measured = 0

    def __call__(self, run) -> float:
        run()
        self.measured += 1
        return 1.0 if (self.measured - 1) % len(CONFIGS) == self.fastest else 2.0


def best(key: str, timer: Timer, configs=CONFIGS) -> Config:
    return tuning.best(key, configs, lambda config: None, GPU, timer)


def test_nothing_is_measured_unless_asked(cache_folder):
    timer = Timer(fastest=1)
    assert best("a", timer) == CONFIGS[0]
    assert timer.measured == 0 and not cache_folder.exists()


def test_the_fastest_is_measured_once_and_kept(monkeypatch, cache_folder):
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    timer = Timer(fastest=2)
    assert best("a", timer) == best("a", timer) == CONFIGS[2]
    assert timer.measured == len(CONFIGS)
    forget()
    monkeypatch.delenv("FUSEDRES_TUNE")
    assert best("a", timer) == CONFIGS[2] and timer.measured == len(CONFIGS)
    assert best("another shape", timer) == CONFIGS[0]
    (path,) = cache_folder.iterdir()
    assert path.name.endswith("nvidia-test-1000-80gb.json")
    assert f"fusedres-{fusedres.__version__}" in path.name
    assert triton.__version__ in path.name and torch.__version__.replace("+", "-") in path.name
    assert json.loads(path.read_text()) == {"a": {"config": [8192, 128, 8], "ms": {"triton": 1.0}}}


def test_a_configuration_that_no_longer_ships_is_measured_again(monkeypatch):
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    assert best("a", Timer(fastest=2)) == CONFIGS[2]
    assert best("a", Timer(fastest=0), configs=CONFIGS[:2]) == CONFIGS[0]


def test_a_configuration_without_memory_is_not_chosen_this_time(monkeypatch):
    """Memory may be free the next time; without any for all, the default says so itself."""
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    monkeypatch.setattr(tuning, "_unfit", set())

    def work(config):
        if config in hungry:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def chosen(key: str) -> Config:
        return tuning.best(key, CONFIGS, work, GPU, Timer(fastest=0))

    hungry = CONFIGS[:1]
    assert chosen("a") == CONFIGS[1]
    hungry = CONFIGS
    assert chosen("b") == CONFIGS[0]
    hungry = ()
    assert chosen("b") == CONFIGS[0] and not tuning._unfit


@pytest.mark.parametrize("content", [
    "", "{", "[1, 2]", "\x00\xff", '{"a": "x"}', '{"a": [1, 2]}', '{"a": {"config": 3}}',
    '{"a": {"config": [2048, 64, 4], "ms": {"triton": "x"}}}',
])  # fmt: skip
def test_a_corrupt_file_counts_as_empty(content, monkeypatch, cache_folder):
    path = tuning.cache_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="latin-1")
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert best("a", Timer(fastest=1)) == CONFIGS[1]
    messages = [str(w.message) for w in caught]
    unreadable = not content.startswith('{"a"')
    assert len(messages) == unreadable and all(str(path) in m for m in messages)
    assert json.loads(path.read_text())["a"]["config"] == [2048, 64, 4]


def test_a_cache_that_cannot_be_written_is_one_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    with pytest.warns(RuntimeWarning, match="measurements are not kept, .*cannot be written") as w:
        assert best("a", Timer(fastest=1)) == CONFIGS[1]
        assert best("b", Timer(fastest=2)) == CONFIGS[2]
    assert len(w) == 1
    assert best("a", Timer(fastest=0)) == CONFIGS[1]  # still known to this process


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEDRES_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_path(GPU).parent == tmp_path / "fusedres"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_path(GPU).parent == Path.home() / ".cache" / "fusedres"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert tuning.cache_path(GPU).parent == Path(tempfile.gettempdir()) / "fusedres"


WRITES = 20


def write_many(path: str, name: str) -> None:
    cache = tuning.Cache(Path(path))
    for i in range(WRITES):
        cache.put(f"{name} {i}", CONFIGS[i % len(CONFIGS)])


def test_processes_share_the_file(tmp_path):
    """It is whole at every moment, and the last writer's entries are all in it."""
    path = tmp_path / "cache.json"
    context = multiprocessing.get_context("fork")
    names = "ab"
    writers = [context.Process(target=write_many, args=(str(path), name)) for name in names]
    for process in writers:
        process.start()
    read = 0
    while any(process.is_alive() for process in writers):
        if path.exists():
            json.loads(path.read_text())
            read += 1
    for process in writers:
        process.join()
        assert process.exitcode == 0
    found = json.loads(path.read_text())
    assert read and any(all(f"{n} {i}" in found for i in range(WRITES)) for n in names)
    assert all(Config(*v["config"]) in CONFIGS for v in found.values())
    assert [p.name for p in tmp_path.iterdir()] == ["cache.json"]


# --- the kernels, measured

OPS = {
    "bn_act": (bn, dict(), lambda t: bn.check_against_reference(t, "relu")),
    "bn_se_act": (bn_se, dict(squeezed=5), bn_se.check_against_reference),
    "residual_mix": (mix, dict(gate=True, rows=True), mix.check_against_reference),
}


@pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels are compiled here")
@pytest.mark.parametrize("fastest", range(3))
@pytest.mark.parametrize("op", OPS)
def test_every_configuration_computes_the_same_and_measuring_writes_to_nothing(
    op, fastest, monkeypatch, cache_folder
):
    module, options, check = OPS[op]
    timers: list[Timer] = []

    def measured(key, configs, work, device):
        timers.append(timer := Timer(fastest % len(configs)))
        return work(tuning.best(key, configs, work, GPU, timer))

    monkeypatch.setenv("FUSEDRES_TUNE", "1")
    monkeypatch.setattr(tuning, "run", measured)
    monkeypatch.setattr(triton_kernels.package().module("bn_act"), "WHOLE_PIXELS", 0)
    tensors = module.tensors_of((2, 24, 3, 5), "NHWC", torch.float32, **options)
    with triton_on("cpu"), Unchanged(*tensors.values()):
        check(tensors)
    assert len(timers) > 1 and {t.measured for t in timers} <= {0, 1, 2, len(CONFIGS), 4}
    choices = json.loads(next(cache_folder.iterdir()).read_text())
    assert len(choices) == sum(t.measured > 0 for t in timers)  # each key was measured once
