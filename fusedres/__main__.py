"""``python -m fusedres doctor | verify | propagation | demo | bench``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import dispatch, models

DTYPES = {str(d).removeprefix("torch."): d for d in dispatch.DTYPES}
MODELS = [name for name in models.__all__ if name.islower()]
USER_ERROR = 2  # argparse's own exit code
INTERRUPTED = 130  # the shell's, after Ctrl-C
_BENCH_OPTIONS = ("--benchmark-only", "--benchmark-quiet", "-q")  # they print a table of their own


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return USER_ERROR
    if args.command == "demo":
        from .demo import main as demo  # here: it needs packages that the library does not

        return demo(rest)
    if args.command == "bench":
        return _bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "doctor":
        from .report import doctor

        return doctor.main(args.json)
    if args.model not in MODELS:
        parser.error(f"unknown model {args.model!r}; the models are: {', '.join(MODELS)}")
    return (_verify if args.command == "verify" else _propagation)(args, parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusedres")
    commands = parser.add_subparsers(dest="command", metavar="command")
    doctor = commands.add_parser("doctor", help="what this machine can run, and why not the rest")
    doctor.add_argument("--json", action="store_true", help="for programs")
    # All arguments of these two, help included, are read elsewhere.
    commands.add_parser(
        "demo", add_help=False, help="train plain and fused blocks on real images, and compare"
    )
    commands.add_parser("bench", add_help=False, help="run the benchmarks; arguments are pytest's")
    verify = commands.add_parser(
        "verify",
        help="compare a model with float64; exits with 1 when it is not exact enough",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model_arguments(verify)
    add = verify.add_argument
    add("--train", action="store_true", help="a training step instead of inference")
    add("--autocast", choices=("bfloat16", "float16"), help="run under torch.autocast")
    add("--backend", choices=("auto", *dispatch.BACKENDS), default="auto")
    add("--all", action="store_true", help="print every row, not only the worst")
    propagation = commands.add_parser(
        "propagation",
        help="norms of signal and gradient in each block; exits with 1 when a sum does not hold",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model_arguments(propagation)
    propagation.add_argument("--plot", metavar="FILE", help="draw them into this file")
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help=f"one of {', '.join(MODELS)}")
    add("--dtype", choices=DTYPES, default="float32", help="of the whole model and its input")
    add("--device", default="auto", help="as torch.device takes it; auto: cuda where there is one")
    add("--channels-last", action="store_true", help="memory format of model and input")
    add("--batch", type=_positive, default=2, help="number of images")
    add("--size", type=_positive, default=64, help="height and width of the images")
    add("--seed", type=int, default=0, help="of the random weights and images")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted a number >= 1, got {text}")
    return value


def _verify(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .report import verify
    from .report.verify import NEAREST

    device = _device(args.device, parser)
    try:
        model, x = _model_and_images(args, device)
        autocast = contextlib.nullcontext()
        if args.autocast is not None:
            autocast = torch.autocast(device.type, DTYPES[args.autocast])
        with dispatch.backend(args.backend), autocast:
            result = verify(model, x, train=args.train)
    except (RuntimeError, TypeError, ValueError) as error:  # names the argument and the reason
        print(f"cannot verify {args.model}: {error}", file=sys.stderr)
        return USER_ERROR
    print(result.table(None if args.all else NEAREST))
    print(
        f"{args.model}, {args.dtype}, {'training' if args.train else 'inference'}: {result.summary}"
    )
    return 0 if result.ok else 1


def _propagation(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .report import propagation

    try:
        found = propagation(*_model_and_images(args, _device(args.device, parser)))
        if args.plot:
            found.plot(args.plot, f"{args.model}, {args.dtype}: signal and gradient by block")
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"cannot measure {args.model}: {error}", file=sys.stderr)
        return USER_ERROR
    print(found)
    if args.plot:
        print(f"written to {args.plot}")
    return 0 if found.ok else 1


def _device(name: str, parser: argparse.ArgumentParser) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        parser.error(f"--device {name}: {str(error).splitlines()[0]}")
    return torch.device(name)


def _model_and_images(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Tensor]:
    """The model with random parameters and statistics of its own, and images to run it on."""
    torch.manual_seed(args.seed)
    model = getattr(models, args.model)()
    x = torch.randn(args.batch, 3, args.size, args.size)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        # torchvision's ones and zeros would hide a forgotten weight or bias.
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = 1.0  # one batch gives statistics that keep a deep network in range
    with torch.no_grad(), dispatch.backend("reference"):
        model(x)
    for norm in norms:
        norm.momentum = 0.1
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    to = dict(device=device, dtype=DTYPES[args.dtype], memory_format=memory_format)
    return model.to(**to), x.to(**to)


def _bench(arguments: Sequence[str]) -> int:
    folders = Path(__file__).parents[1] / "benchmarks", Path("benchmarks")
    folder = next((f for f in folders if any(f.glob("bench_*.py"))), None)
    if folder is None:
        print(
            "the benchmarks are in the source tree, not in the wheel: in a checkout run\n"
            "    pytest benchmarks --benchmark-only",
            file=sys.stderr,
        )
        return USER_ERROR
    if {"-h", "--help"} & {*arguments}:
        return _bench_help(folder)
    missing = [m for m in ("pytest", "pytest_benchmark") if importlib.util.find_spec(m) is None]
    if missing:
        print(f"the benchmarks need {' and '.join(missing)}", file=sys.stderr)
        return USER_ERROR
    import pytest  # here: it is no dependency

    try:
        return int(pytest.main([str(folder), *_BENCH_OPTIONS, *arguments]))
    except KeyboardInterrupt:  # before the run; one inside of it is told by the benchmarks
        print("interrupted: nothing has been measured", file=sys.stderr)
        return INTERRUPTED


def _bench_help(folder: Path) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fusedres bench",
        description="Run the benchmarks, each competitor in turns.",
        epilog="pytest's options work too, -k NAME among them: see python -m pytest --help",
    )
    runpy.run_path(str(folder / "options.py"))["declare"](parser.add_argument)
    parser.print_help()
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE") and "bench" not in sys.argv[1:2]:  # which talks to processes
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends quietly
    sys.exit(main())
