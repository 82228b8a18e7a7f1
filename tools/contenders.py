"""What tools.benchmark times: a network in a mode, on a batch. tools/turns.py gives each a process of its own.

Modes of PyTorch: eager; compiled; freezing, compiled with the weights as constants; graphs, compiled into CUDA graphs.
Other runtimes run the exported network: onnxruntime, openvino. The last three, and features, are inference only.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import gvt

# isort: split
import numpy as np
import timm
import torch
import torch._inductor.config
import torch.nn.functional as F
from timm.models.twins import Twins as TimmTwins
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dense import libraries
from gvt_ops import accelerate, compile, onednn
from gvt_ops.compiling import compile_options
from gvt_ops.torch_private import export
from tools import runtimes
from tools.measurement import seconds
from training import checkpoint, formats
from training.errors import UserError

RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}  # modes, and the formats of their files
SAME_WEIGHTS = {"inference": "timm", "training": "timm", "features": "mmseg"}
RECOMPUTED = "MLP recomputed"  # ours, with less memory
GEMM = "GEMM"
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
REFERENCE = "reference"
REFERENCE_CHUNK = 8  # images of the float64 reference at once
SMALLEST_SHARE = 0.01  # of an operator in a profile
LOSS_SCALE = {"float16": 1024.0}

Name = tuple[str, str]  # a library or network, and a mode


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured in turns: a model of gvt.MODEL_NAMES, a task, a dtype, a batch of size x size images."""

    model: str
    task: str
    dtype: str
    batch: int
    size: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def autocast(self) -> bool:
        return self.task == "training" and self.dtype in ("bfloat16", "float16")

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.autocast else self.torch_dtype

    def __str__(self) -> str:
        return f"{self.model} {self.task} {self.dtype} {self.batch} x {self.size} x {self.size}"


# ---------------------------------------------------------------- networks


def build(case: Case, library: str, device: torch.device) -> nn.Module:
    """Build "ours", RECOMPUTED, "timm", "mmseg", all with the same weights, or another network of timm by its name."""
    if library in ("ours", RECOMPUTED):
        model = build_ours(case)
        if library == RECOMPUTED:
            model.set_grad_checkpointing(part="mlp")
    elif library in SAME_WEIGHTS.values():
        model = build_peer(case, library)
    else:
        torch.manual_seed(0)
        fixed = timm.get_pretrained_cfg(library).fixed_input_size
        model = timm.create_model(library, **(dict(img_size=case.size) if fixed else {}))
    return model.to(device, case.weight_dtype).train(case.task == "training")


def build_ours(case: Case) -> nn.Module:
    """Build with seeded weights, and pad windows at a map's edge as the other library does."""
    torch.manual_seed(0)
    if case.task == "features":
        libraries.load("mmseg")
        from dense.backbone import TwinsBackbone

        model = TwinsBackbone(gvt.MODEL_NAMES[case.model], drop_path_rate=0.0, pad="published")
    else:
        model = timm.create_model(case.model, pad="zero")
    with torch.no_grad():
        # Biases and norms are neither all 0 nor all 1: each must find its place in the other library.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.02 * torch.randn_like(parameter)
    return accelerate(model)


def build_peer(case: Case, library: str) -> nn.Module:
    """Build timm's or mmsegmentation's network with our weights, and the official eps of each norm."""
    v = gvt.VARIANTS[gvt.MODEL_NAMES[case.model]]
    shape = {name: list(getattr(v, name)) for name in ("mlp_ratios", "depths", "sr_ratios")}
    shape |= dict(embed_dims=list(v.dims), num_heads=list(v.heads))
    windows = None if v.window is None else [v.window] * len(v.dims)
    if library == "timm":
        model = TimmTwins(img_size=case.size, wss=windows, **shape)
    else:
        libraries.load("mmseg")
        from mmseg.models import backbones

        # The option is spelled so there.
        own = dict(norm_after_stage=False) if windows is None else dict(norm_after_stage=True, windiow_sizes=windows)
        model = (backbones.PCPVT if windows is None else backbones.SVT)(qkv_bias=True, **own, **shape)
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5 if "patch_embeds" in name or name.endswith("attn.norm") else 1e-6
    state, _, _ = formats.from_official(build_ours(case).state_dict(), library, source=case.model)
    checkpoint.load_into(model, state, source=case.model)
    return model


# ---------------------------------------------------------------- modes


def compiled(network: nn.Module, library: str, mode: str) -> tuple[nn.Module, dict]:
    """Return a network as torch.compile makes it, and the settings of Inductor: ours with those of gvt_ops.compile."""
    graphs = {"triton.cudagraphs": True} if mode == "graphs" else {}
    if library in ("ours", RECOMPUTED):
        options = compile_options(mode == "freezing") | graphs
        return compile(network, inference=mode == "freezing", **graphs), options
    # The tracer looks at the setting itself too, not only at the options.
    torch._inductor.config.freezing = mode == "freezing"
    options = {"freezing": True} if mode == "freezing" else graphs
    return torch.compile(network, dynamic=False, options=options), options


def exported(case: Case, library: str, mode: str) -> Callable[[Tensor], Tensor]:
    """Return images -> logits by another runtime, of the plain network as a file for batches of this size.

    OpenVINO computes in the case's dtype, from a file in float32. For a process of its own: it sets timm's switches.
    """
    fmt = RUNTIMES[mode]
    runtimes.require(fmt)
    if mode == "onnxruntime" and case.dtype != "float32":
        raise UserError(f"ONNX Runtime has no convolution in {case.dtype} on a CPU: use float32")
    timm.layers.set_fused_attn(False)
    timm.layers.set_exportable(True)
    network = build(dataclasses.replace(case, dtype="float32"), library, torch.device("cpu"))
    program = export(accelerate(network, enable=False), torch.zeros(case.batch, 3, case.size, case.size), (), 1)
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"network{runtimes.SUFFIXES[fmt]}"
        runtimes.write(program, fmt, path, {})
        return runtimes.open_file(fmt, path, precision={"float32": "f32", "bfloat16": "bf16"}[case.dtype])


# ---------------------------------------------------------------- what is run, and what comes out


class Timed:
    """Something with a step on a device."""

    device: torch.device

    def step(self) -> None:
        raise NotImplementedError

    def time(self, steps: int) -> float:
        """Return the seconds of a step, the mean of several.

        On a GPU a first step is not timed, in which the host gets ahead.
        """
        if self.device.type != "cuda":
            return seconds(lambda: [self.step() for _ in range(steps)], self.device) / steps
        self.step()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            self.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / steps


class Gemm(Timed):
    """The machine's peak rate is that of a large product, by "mm" or "oneDNN"."""

    def __init__(self, case: Case, name: Name, device: torch.device):
        self.device, by = device, name[1]
        a, b, out = (torch.randn(2 * [GEMM_SIDE[device.type]], device=device).to(case.torch_dtype) for _ in range(3))
        if by == "mm":
            self.step = lambda: torch.mm(a, b, out=out)
        elif reason := onednn.unsupported_reason(a, b):
            raise UserError(f"no GEMM by {by}: {reason}")
        else:
            self.step = lambda: onednn.linear(a, b)


class Runner(Timed):
    """A network in a mode, on a batch: step() is what is timed, outputs() what must be equal."""

    def __init__(self, case: Case, name: Name, device: torch.device):
        self.case, self.device = case, device
        library, mode = name
        self.dtype = torch.float32 if mode in RUNTIMES else case.weight_dtype
        self.options = None
        self.module = None if mode in RUNTIMES else build(case, library, device)
        if mode in RUNTIMES:
            self.model = exported(case, library, mode)
        elif mode == "eager":
            self.model = self.module
        else:
            self.model, self.options = compiled(self.module, library, mode)
        torch.manual_seed(1)
        self.images = torch.randn(case.batch, 3, case.size, case.size).to(device, self.dtype)
        self.targets = torch.randint(1000, (case.batch,)).to(device)
        if case.task == "training":
            self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-6, fused=True)
            self.scaler = torch.amp.GradScaler(device.type, enabled=case.dtype == "float16")

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=self.case.torch_dtype, enabled=self.case.autocast):
            return F.cross_entropy(self.model(images), targets)

    def step(self) -> None:
        if self.case.task != "training":
            with torch.inference_mode():
                self.model(self.images)
            return
        self.scaler.scale(self.loss(self.images, self.targets)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def outputs(self, chunk: int | None = None) -> Tensor:
        """Return logits, maps or gradients as one float64 vector. chunk: images at once (all)."""
        parts = [part.split(chunk or self.case.batch) for part in (self.images, self.targets)]
        if self.case.task == "training":
            return self.gradients(zip(*parts))
        with torch.inference_mode():
            results = [self.model(images) for images in parts[0]]
        tensors = [part for result in results for part in ([result] if isinstance(result, Tensor) else result)]
        return torch.cat([tensor.flatten() for tensor in tensors]).double()

    def gradients(self, batches) -> Tensor:
        """Return the gradients of the mean loss over all batches, parameters sorted by name."""
        scale = LOSS_SCALE.get(self.case.dtype, 1.0)
        for images, targets in batches:
            (scale * self.loss(images, targets) * len(images) / self.case.batch).backward()
        parameters = [parameter for _, parameter in sorted(self.module.named_parameters())]
        gradients = torch.cat([parameter.grad.flatten() for parameter in parameters]).double() / scale
        self.module.zero_grad(set_to_none=True)
        return gradients

    def error(self, reference: Path | None) -> float | None:
        """Return the root mean square error against saved outputs; None without them, after a first step."""
        if reference is None:
            self.step()
            return None
        return rms(self.outputs().cpu() - torch.from_numpy(np.load(reference, mmap_mode="c")))

    def facts(self, *, memory: bool, profiled: bool) -> dict:
        """Return what a row says beside times: the compiler's options, fused attention as it was chosen, memory."""
        found = {} if self.options is None else {"compile_options": self.options}
        if memory:
            found |= peak_memory(self.step, self.device)
        if self.module is not None:
            called = operator_times(self.step, self.device, 1)
            found["attention"] = sorted(name for name in called if "_scaled_dot_product_" in name)
            if profiled:
                found["operators"] = operators(self.step, self.device)
        return found


class Reference:
    """What the outputs of a case are compared with."""

    def __init__(self, case: Case, name: Name, device: torch.device):
        self.case, self.device = case, device

    def save(self, path: Path) -> tuple[float, float]:
        """Write the outputs in float64; return their root mean square, and the error of plain PyTorch in the dtype."""
        exact, plain = self.outputs("float64"), self.outputs(self.case.dtype)
        np.save(path, exact.numpy())
        return rms(exact), rms(plain - exact)

    def outputs(self, dtype: str) -> Tensor:
        runner = Runner(dataclasses.replace(self.case, dtype=dtype), ("ours", "eager"), self.device)
        accelerate(runner.module, enable=False).set_fused_attn(False)
        return runner.outputs(REFERENCE_CHUNK).cpu()


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


# ---------------------------------------------------------------- memory and operators


def resident_mb(key: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def peak_memory(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return the MB at the peak of two steps (peak_mb) and before them (rest_mb: network, batch, optimizer).

    CUDA: of torch's allocator. Linux: resident memory of the whole process, Python and libraries included. Elsewhere
    nothing is returned.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated() / 2**20
    elif sys.platform == "linux":
        # Resets the peak.
        Path("/proc/self/clear_refs").write_text("5")
        rest = resident_mb("VmRSS")
    else:
        return {}
    for _ in range(2):
        seconds(step, device)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident_mb("VmHWM")
    # The kernel updates a peak late, and in steps of many pages.
    return {"peak_mb": max(peak, rest), "rest_mb": rest}


def operator_times(step: Callable[[], object], device: torch.device, steps: int) -> dict[str, float]:
    """Return the time in each operator without those that it calls."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as trace:
        for _ in range(steps):
            step()
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    return {event.key: getattr(event, attribute) for event in trace.key_averages()}


def operators(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return the share of a step's time that each operator takes, the largest first."""
    spent = operator_times(step, device, 3)
    shares = {name: spent[name] / sum(spent.values()) for name in sorted(spent, key=spent.get, reverse=True)}
    return {name: share for name, share in shares.items() if share >= SMALLEST_SHARE}
