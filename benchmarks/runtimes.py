"""Peers that are no PyTorch: OpenVINO, onnxruntime and TensorRT, in inference."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .machine import has_bf16_convolution
from .measure import Competitor
from .peers import ONNXRUNTIME, OPENVINO, TENSORRT, Unavailable

IN_FLOAT32 = "in float32: {}"


def _needs(*modules: str) -> None:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise Unavailable(
            f"{', '.join(missing)} not installed: pip install -r requirements/bench.txt"
        )


def _in_float32(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The model and its input in these runtimes' native order, NCHW, with the same values."""
    plain = copy.deepcopy(model).float().to(memory_format=torch.contiguous_format)
    return plain, x.float().contiguous()


def openvino(model: nn.Module, x: Tensor) -> Competitor:
    """OpenVINO's CPU plugin on the torch model, tuned for latency, with as many threads as torch.

    Weights and input of a bfloat16 model reach it as the same values in float32, with bfloat16 as
    the precision hint.
    """
    _needs("openvino")
    import openvino

    low = x.dtype == torch.bfloat16
    precision = "bf16" if low and has_bf16_convolution() else "f32"
    plain, own = _in_float32(model, x)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    with torch.no_grad(), _deprecated_exporter():
        converted = openvino.convert_model(plain, example_input=own)
    converted.reshape(list(own.shape))
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    array = own.numpy()

    def call():
        return compiled(array, share_inputs=True, share_outputs=True)[0]

    note = None
    if low and precision == "f32":
        note = IN_FLOAT32.format("this CPU has no bfloat16 in oneDNN")
    return _runtime(OPENVINO, call, own, x, note)


def onnxruntime(model: nn.Module, x: Tensor) -> Competitor:
    """onnxruntime's CPU provider with all its graph optimisations and as many threads as torch."""
    _needs("onnxruntime", "onnx")
    import onnxruntime

    plain, own = _in_float32(model, x)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads would otherwise spin on into the next competitor's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _export(plain, own, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: own.numpy()}

    def call():
        return session.run(None, feed)[0]

    low = x.dtype != torch.float32
    note = IN_FLOAT32.format("its CPU provider has no bfloat16 convolution") if low else None
    return _runtime(ONNXRUNTIME, call, own, x, note)


def _export(model: nn.Module, x: Tensor, path: Path) -> None:
    # The newer exporter wants two more packages, and writes the same graph of a ResNet.
    with _deprecated_exporter():
        torch.onnx.export(model, (x,), path, dynamo=False)


@contextmanager
def _deprecated_exporter() -> Iterator[None]:
    """Both converters go through torch.jit.trace, which torch 2.13 warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _runtime(name: str, call, own: Tensor, x: Tensor, note: str | None) -> Competitor:
    """``call`` returns an array over ``own``, which gets the present input before each call."""

    def prepare() -> None:
        own.copy_(x)

    def results() -> dict[str, Tensor]:
        prepare()
        return {"y": torch.from_numpy(call()).clone()}

    return Competitor(name, call, results, prepare, note)


def tensorrt(model: nn.Module, x: Tensor) -> Competitor:
    """TensorRT's engine of the exported model, in the input's precision, on the current stream."""
    _needs("tensorrt", "onnx")
    import tensorrt

    plain, own = model.to(memory_format=torch.contiguous_format), x.contiguous()
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    # The network keeps the exported types: bfloat16 and float16 models run as such.
    typed = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = tensorrt.OnnxParser(network, logger)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _export(plain, own, path)
        if not parser.parse_from_file(str(path)):
            raise RuntimeError(parser.get_error(0).desc())
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    engine = tensorrt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    source, target = engine.get_tensor_name(0), engine.get_tensor_name(1)
    y = torch.empty(tuple(engine.get_tensor_shape(target)), dtype=x.dtype, device=x.device)
    context.set_tensor_address(source, own.data_ptr())
    context.set_tensor_address(target, y.data_ptr())

    def call() -> Tensor:
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return y

    def results() -> dict[str, Tensor]:
        own.copy_(x)
        found = call().clone()
        torch.cuda.synchronize()
        return {"y": found}

    return Competitor(TENSORRT, call, results, lambda: own.copy_(x))
