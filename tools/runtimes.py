"""Write a network as a file of another runtime, and run such a file: pt2, onnx, openvino.

Images are float32 (B, 3, H, W) in every file; outputs are as the network's, a tensor or a tuple of them. Batch and
sides are fixed unless they are told to vary.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from gvt import SMALLEST
from gvt_ops.torch_private import export
from tools.extra import need
from training.errors import UserError
from training.files import sync_folder
from training.outputs import writing

Outputs = Tensor | tuple[Tensor, ...]
SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "openvino": ".xml", "safetensors": ".safetensors"}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
# Of tokens, each for itself: their operators on (B, H, W, C) may as well have (B, H * W, C).
ATEN = torch.ops.aten
BY_TOKEN = (ATEN.layer_norm.default, ATEN.linear.default, ATEN.gelu.default, ATEN.add.Tensor)
# Traced where sides vary. No map has a side of one token, nor two equal ones, which would be taken for constants.
TRACED = (256, 288)


@dataclass(frozen=True)
class Shape:
    """Which images a file takes: of size x size pixels (or size x width) one by one, or batches and sides that vary."""

    size: int
    dynamic_batch: bool = False
    dynamic_size: bool = False
    width: int | None = None
    channels: int = 3

    @property
    def sides(self) -> tuple[int, int]:
        return self.size, self.width or self.size

    def __str__(self) -> str:
        sides = "any height and width" if self.dynamic_size else "{} x {} pixels".format(*self.sides)
        return f"{'any number' if self.dynamic_batch else 'one'} at a time, {sides}"


def require(fmt: str) -> None:
    """Raise UserError if a package that the format needs is missing."""
    for package in PACKAGES.get(fmt, ()):
        need(package)


class InPrecision(nn.Module):
    """A network in half precision between images and outputs in float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image.to(self.dtype)).float()


# ---------------------------------------------------------------- writing


def trace(network: nn.Module, shape: Shape) -> ExportedProgram:
    height, width = TRACED if shape.dynamic_size else shape.sides
    image = torch.zeros(2 if shape.dynamic_batch else 1, shape.channels, height, width)
    varying = ((0,) if shape.dynamic_batch else ()) + ((2, 3) if shape.dynamic_size else ())
    return export(network, image, varying, SMALLEST)


def write(program: ExportedProgram, fmt: str, path: Path, info: dict, outputs: Sequence[str] = ("logits",)) -> None:
    """Write a traced network, with info in it (onnx) or as JSON beside it (path + ".json"). outputs: their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries about each other
        save = {"pt2": pt2_writer, "onnx": onnx_writer, "openvino": openvino_writer}[fmt](program, info, outputs)
        with writing(path.name):
            save(path)
            if fmt != "onnx":
                write_info(path, info)


def info_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def write_info(path: Path, info: dict) -> None:
    info_path(path).write_text(json.dumps(info, indent=1) + "\n")


def pt2_writer(program: ExportedProgram, info: dict, outputs: Sequence[str]) -> Callable[[Path], None]:
    content = io.BytesIO()  # not a file: torch's writer ends the process where a disk is full
    torch.export.save(program, content)
    return lambda path: path.write_bytes(content.getbuffer())


def onnx_writer(program: ExportedProgram, info: dict, outputs: Sequence[str]) -> Callable[[Path], None]:
    names = dict(input_names=["image"], output_names=list(outputs))
    model = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False, **names).model_proto
    name_sides(model)
    return lambda path: save_onnx(model, path, info)


def name_sides(model) -> None:
    """Call the sizes of an ONNX model's images that vary batch, height and width, which the tracer has numbered."""
    graph = model.graph
    shape = graph.input[0].type.tensor_type.shape.dim
    named = {size.dim_param: name for size, name in zip(shape, ("batch", "channels", "height", "width"))}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = named.get(size.dim_param, size.dim_param)


def save_onnx(model, path: Path, info: dict) -> None:
    onnx = need("onnx")
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in info.items()})
    onnx.save(model, path)


def openvino_writer(program: ExportedProgram, info: dict, outputs: Sequence[str]) -> Callable[[Path], None]:
    model = to_openvino(program, outputs)
    return lambda path: need("openvino").save_model(model, path, compress_to_fp16=False)


def to_openvino(program: ExportedProgram, outputs: Sequence[str] = ("logits",)):
    """Return OpenVINO's model, made from the program: made from an ONNX file, one with sides that vary would answer
    wrongly at all sizes once the first images had given a last map of 1 x 1.
    """
    # Where this is missing, OpenVINO reports no use of it to its makers, for which it would start processes.
    sys.modules.setdefault("openvino_telemetry", None)
    openvino = need("openvino")
    flatten_tokens(program)
    with openvino_thread() as thread:
        # The mode that the program's tensors were made in is a thread's.
        model = thread.submit(torch.inference_mode()(openvino.convert_model), program).result()
    model.inputs[0].get_tensor().set_names({"image"})
    for output, name in zip(model.outputs, outputs, strict=True):
        output.get_tensor().set_names({name})
    # It would take any images: the program's own limits are not converted.
    image = next(node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    batch, channels, *sides = (-1 if isinstance(size, torch.SymInt) else size for size in image.meta["val"].shape)
    sides = [openvino.Dimension(SMALLEST, -1) if side == -1 else side for side in sides]
    model.reshape(openvino.PartialShape([batch, channels, *sides]))
    return model


def flatten_tokens(program: ExportedProgram) -> None:
    """Let operators on tokens take (B, H * W, C) for (B, H, W, C), with the same results, where sides are fixed.

    On a CPU, OpenVINO has no kernel for LayerNorm on four dimensions and stores such maps with the channels outermost:
    without this, a Twins takes 1.15 times as long.
    """
    graph = program.graph
    for node in [node for node in graph.nodes if node.target in BY_TOKEN]:
        maps = [each for each in node.args if isinstance(each, fx.Node) and each.meta["val"].dim() == 4]
        sides = [each.meta["val"].shape[1:3] for each in (*maps, node) if each.meta["val"].dim() == 4]
        fixed = maps and all(isinstance(side, int) for pair in sides for side in pair) and len(set(sides)) == 1
        if not fixed or any(user.op == "output" for user in node.users):
            continue
        with graph.inserting_before(node):
            flat = {each: graph.call_function(ATEN.flatten.using_ints, (each, 1, 2)) for each in maps}
        with graph.inserting_after(node):
            whole = graph.call_function(ATEN.unflatten.int, (node, 1, list(sides[0])))
        whole.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(whole, delete_user_cb=lambda user, whole=whole: user is not whole)
        node.args = tuple(flat.get(each, each) if isinstance(each, fx.Node) else each for each in node.args)
        for old, new in (*flat.items(), (whole, node)):
            new.meta["val"] = old.meta["val"].flatten(1, 2)
    program.graph_module.recompile()


def openvino_thread() -> ThreadPoolExecutor:
    """Return a thread to call OpenVINO in.

    OpenVINO gives the thread that calls it an alternate stack for signals, and frees that memory with the model. In the
    main thread the next signal with a handler, Ctrl-C or the end of a loader's worker, would end the process.
    """
    return ThreadPoolExecutor(1, thread_name_prefix="openvino")


def check_new(output: Path, fmt: str, *, overwrite: bool) -> None:
    """Raise UserError for a name that no file of this format can have, or that exists."""
    if output.suffix != SUFFIXES[fmt]:
        raise UserError(f"a file of another format (--output {output}): end its name in {SUFFIXES[fmt]}")
    if not output.absolute().parent.is_dir():
        raise UserError(f"no such folder (--output {output}): make it first")
    others = {"onnx": [], "openvino": [output.with_suffix(".bin"), info_path(output)]}.get(fmt, [info_path(output)])
    for path in (output, *others):
        if path.is_dir() or (os.path.lexists(path) and not overwrite):
            raise UserError(f"it exists already (--output, {path}): choose another name, or pass --overwrite")


class CheckFailed(Exception):
    """What was written does not compute what it should."""


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield output's name in a new folder beside it. At the end all files of that folder are moved beside output; after
    an error none is.
    """
    folder = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with writing(output.name):
            folder.mkdir()
        yield folder / output.name
        with writing(output.name):
            # The file that others open comes last, so that what belongs to it is there.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == output.name):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(path, output.with_name(path.name))
            sync_folder(output.absolute().parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- running


def open_file(fmt: str, path: Path, *, precision: str | None = "f32") -> Callable[[Tensor], Outputs]:
    """Return images -> outputs, computed by the file alone with as many threads as torch has.

    precision: that OpenVINO computes in, f32 or bf16; None for the one that it chooses for the processor.
    """
    if fmt == "pt2":
        return run_pt2(path)
    return run_onnx(path) if fmt == "onnx" else run_openvino(path, precision)


def run_pt2(path: Path) -> Callable[[Tensor], Outputs]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A guard would refuse a batch of one.
        return torch.inference_mode()(torch.export.load(path).module(check_guards=False))


def tensors(arrays: Iterable[np.ndarray]) -> Outputs:
    found = tuple(torch.from_numpy(array.copy()) for array in arrays)
    return found if len(found) > 1 else found[0]


def run_onnx(path: Path) -> Callable[[Tensor], Outputs]:
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    # Its threads would take the cores of whatever runs after it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: tensors(session.run(None, {"image": images.numpy()}))


def run_openvino(path: Path, precision: str | None) -> Callable[[Tensor], Outputs]:
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    settings |= {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    thread = openvino_thread()
    compiled = thread.submit(need("openvino").compile_model, path, "CPU", settings).result()
    return lambda images: tensors(thread.submit(compiled, images.numpy()).result().values())


def sizes_to_check(shape: Shape) -> list[tuple[int, int]]:
    """Return heights and widths: the shape's own, and if sides vary the smallest before it and another after it."""
    sizes = [shape.sides]
    if shape.dynamic_size:
        sizes = [(SMALLEST, SMALLEST), *sizes, (shape.size + 8, shape.size + 40)]
    return list(dict.fromkeys(sizes))


def notes(fmt: str, path: Path, shape: Shape) -> str:
    """Return which images the file takes, and what one must know to open it."""
    size = sum(each.stat().st_size for each in path.parent.iterdir()) / 1e6
    parts = [f"{size:.1f} MB"]
    if fmt == "safetensors":
        return parts[0]
    parts.append(f"takes {shape}")
    if fmt == "onnx":
        model = need("onnx").load(path, load_external_data=False)
        opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
        parts.append(f"opset {opset}, IR {model.ir_version}")
    if fmt == "pt2":
        strict = "a batch of one" if shape.dynamic_batch else ""
        strict += (" and " if strict else "") + "sides below 64" if shape.dynamic_size else ""
        guards = f", with guards it refuses {strict}" if strict else ""
        parts.append(f"open it with torch.export.load(FILE).module(check_guards=False){guards}")
    if shape.dynamic_size:
        parts.append(f"refuses sides below {SMALLEST} pixels")
    return "; ".join(parts)
