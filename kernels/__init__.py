"""Triton kernels, installed as ``fusedres.kernels``: one file an op, with its launchers.

Importing this package does not import Triton; ``launcher`` does. A launcher has exactly the
arguments and results of its op's schema, and its inputs are dense (``fusedres.layout.dense``).

| file | what is in it |
|---|---|
| launch.py | how a kernel is started: tile sizes, devices, the count of launches |
| tuning.py | the measured choice among a kernel's configurations, kept on disk |
| rivals.py | the measured choice between a launcher and the library's CUDA kernel |
| activations.py, tile.py | device functions: activations, gates; addresses, bit masks |
| stats.py | per-channel statistics of x |
| stream.py | the apply, reduce and backward-apply passes that several ops share |
| residual_sum.py, norm_rows.py | the passes of residual_add and of add_norm |
| gates.py | rows of pre-activations, for the gates of highway and lstm_cell |
| mlp.py | the squeeze-excite MLP on [N, C] |
| implicit_gemm.py, conv.py | the convolutions' mainloop; its configurations, and who convolves |
| ways.py | who can convolve, and what our kernels take; the one file without Triton |
| bn_act_grid.py | bn_act in one cooperative launch, for tensors that the chip holds |
| <op>.py | the op's launchers, and the kernels that are its own |

``kernels`` is the name of another package, so this folder refuses to be imported under it.
"""

import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

if __name__ != "fusedres.kernels":
    raise ImportError(f"this folder is the package fusedres.kernels, not {__name__!r}")

# Which file holds the launcher of an op; the launcher has the op's name.
LAUNCHERS = {
    "bn_act": "bn_act",
    "bn_act_backward": "bn_act",
    "bn_stats": "bn_act",
    "squeeze_excite": "squeeze_excite",
    "squeeze_excite_backward": "squeeze_excite",
    "bn_se_act": "bn_se_act",
    "bn_se_act_backward": "bn_se_act",
    "residual_mix": "residual_mix",
    "residual_mix_backward": "residual_mix",
    "residual_add": "residual_add",
    "residual_add_backward": "residual_add",
    "add_norm": "add_norm",
    "add_norm_backward": "add_norm",
    "highway": "highway",
    "highway_backward": "highway",
    "lstm_cell": "lstm_cell",
    "lstm_cell_backward": "lstm_cell",
    "dense_store": "dense_block",
    "dense_load": "dense_block",
    "dense_grad": "dense_block",
    "dense_finish": "dense_block",
    "conv_bn_act": "conv_bn_act",
    "conv_stats": "conv_stats",
    "conv_grad": "conv_grad",
}


def cache_folder() -> Path:
    """Where the measured choices are kept: FUSEDRES_CACHE_DIR, or fusedres/ in the user's cache."""
    folder = os.environ.get("FUSEDRES_CACHE_DIR")
    if folder:
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(cache or Path.home() / ".cache") / "fusedres"
    except RuntimeError:  # a user without a home, as containers may run under
        return Path(tempfile.gettempdir()) / "fusedres"


def tuning_asked() -> bool:
    """Whether unknown shapes are to be measured: FUSEDRES_TUNE is set."""
    return os.environ.get("FUSEDRES_TUNE", "") not in ("", "0")


def launcher(op: str) -> Callable:
    """The function that runs ``op`` on Triton.

    Raises:
        KeyError: there is none (``op not in LAUNCHERS``).
        ImportError: Triton is not installed.
    """
    return getattr(module(LAUNCHERS[op]), op)


def module(name: str) -> ModuleType:
    """The file ``name``.py of this folder; importing it, unless it is ``ways``, imports Triton."""
    return importlib.import_module(f"{__name__}.{name}")
