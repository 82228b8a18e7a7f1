"""int8 files of onnx and openvino: static quantization, calibrated on images.

The linear layers alone are in int8, their inputs between the smallest and largest values that calibration meets. The
rest, a small part of the operations, is left: with it, or with ranges that cut values off, logits differ by three to
six times as much.
"""

import contextlib
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.export import ExportedProgram

from tools import runtimes
from tools.extra import need
from tools.trained import Trained
from training.errors import UserError
from training.folders import image_files
from training.images import ImageReader
from training.outputs import writing
from utils import log

IMAGES = 300  # for calibration, spread evenly over those given
PACKAGES = {"onnx": "onnxruntime.quantization", "openvino": "nncf"}


def calibration_images(folder: Path, trained: Trained) -> list[Tensor]:
    """Return prepared images of a folder and those below, each (1, 3, size, size)."""
    files = image_files([str(folder)])
    if not files:
        raise UserError(f"no images (--calibrate {folder}): name a folder with images like those to be classified")
    chosen = sorted(set(np.linspace(0, len(files) - 1, IMAGES).round().astype(int)))
    reader = ImageReader("calibration", alpha=trained.alpha)
    images = [trained.transform(reader(files[index]))[None] for index in chosen]
    reader.report(final=True)
    log(f"calibrated on {len(images)} of {len(files)} images in {folder}")
    return images


def write(program: ExportedProgram, fmt: str, path: Path, info: dict, images: list[Tensor]) -> None:
    """Write a traced float32 network in int8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries about each other
        {"onnx": write_onnx, "openvino": write_openvino}[fmt](program, path, info, images)


class Reader:
    """What onnxruntime takes calibration images from."""

    def __init__(self, images: list[Tensor]):
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"image": image.numpy()}


def write_onnx(program: ExportedProgram, path: Path, info: dict, images: list[Tensor]) -> None:
    quantization, onnx = need("onnxruntime.quantization"), need("onnx")
    root = logging.getLogger()
    level = root.level
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float32.onnx"
        runtimes.write(program, "onnx", plain, info)
        root.setLevel(logging.ERROR)  # advice about models with other layers
        try:
            with writing(path.name):
                quantization.quantize_static(
                    plain,
                    path,
                    Reader(images),
                    op_types_to_quantize=["MatMul", "Gemm"],
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=quantization.QuantType.QInt8,
                    weight_type=quantization.QuantType.QInt8,
                    calibrate_method=quantization.CalibrationMethod.MinMax,
                )
                runtimes.save_onnx(onnx.load(path), path, info)
        finally:
            root.setLevel(level)


def write_openvino(program: ExportedProgram, path: Path, info: dict, images: list[Tensor]) -> None:
    nncf, openvino = need("nncf"), need("openvino")
    nncf.set_log_level(logging.ERROR)
    model = runtimes.to_openvino(program)
    others = {operation.get_type_name() for operation in model.get_ops()} - {"MatMul"}
    ranges = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
    with contextlib.redirect_stdout(sys.stderr), runtimes.openvino_thread() as thread:  # what it prints is progress
        quantized = thread.submit(
            nncf.quantize,
            model,
            nncf.Dataset([image.numpy() for image in images]),
            preset=nncf.QuantizationPreset.MIXED,  # zero need not be the middle of a range: GELU's outputs are positive
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(types=sorted(others), validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(activations_range_estimator_params=ranges),
        )
    with writing(path.name):
        openvino.save_model(quantized.result(), path, compress_to_fp16=False)
        runtimes.write_info(path, info)
