"""The model that the options ask for: created, loaded, moved to its device, compiled, and wrapped."""

import gvt
import gvt_ops

# isort: split
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine import autocast
from gvt_ops.loading import model_settings
from training import threads
from training.checkpoint import Checkpoint, finetune
from training.errors import UserError, short_reason
from training.optimizer import freeze_parts
from training.options import Options
from training.precision import amp_dtype, autocast_residuals
from utils import get_world_size, log, warn


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_model(args: Options, num_classes: int, *, pretrained: bool = False) -> nn.Module:
    """Create --model with new weights, or with those on timm's hub."""
    log(f"Creating model: {args.model}")
    rates = dict(drop_rate=args.drop, drop_path_rate=args.drop_path)
    try:
        settings = model_settings(vars(args), "--model-kwargs")
        model = timm.create_model(args.model, pretrained=pretrained, num_classes=num_classes, **rates, **settings)
    except Exception as error:  # of the model's class, or of the hub's client and the network
        reason = short_reason(error, 160)
        if pretrained and isinstance(error, (OSError, RuntimeError)):
            advice = "connect to the network, or pass a file as --finetune FILE"
            raise UserError(f"no weights (--pretrained: {reason}): {advice}") from error
        if args.model_kwargs:
            raise UserError(f"cannot make {args.model} (--model-kwargs): {reason}; omit it, or change it") from error
        raise
    return gvt_ops.accelerate(model) if isinstance(model, gvt.Twins) else model


def prepare_model(model: nn.Module, args: Options, device: torch.device) -> nn.Module:
    """Move a model to its device, in the memory format and with the recomputation that the options ask for."""
    log(f"number of params: {count_parameters(model)}")
    if args.grad_checkpointing == "mlp":
        if not isinstance(model, gvt.Twins):
            where = f"--grad-checkpointing mlp, --model {args.model}"
            raise UserError(f"only models of gvt.py can recompute MLPs alone ({where}): omit mlp")
        model.set_grad_checkpointing(part="mlp")
    elif args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.residual_dtype == "autocast":
        autocast_residuals(model)
        if amp_dtype(args, device) == torch.float32:
            warn("without effect (--residual-dtype autocast): --amp-dtype is float32")
    # Otherwise the format of the weights stays: PEG's are channels-last, as its gradients are.
    return model.to(device, memory_format=torch.channels_last) if args.channels_last else model.to(device)


def compile_model(model: nn.Module, args: Options, *, inference: bool = False) -> nn.Module:
    """Compile a prepared model if the options ask for it, and log what computes it."""
    network, lines, device = model, [], next(model.parameters()).device
    if args.torchcompile:
        # The last, smaller batch compiles once more, which takes much less than one graph for any size.
        try:
            network = gvt_ops.compile(model, inference=inference, backend=args.torchcompile)
        except RuntimeError as error:
            what = f"no such compiler (--torchcompile {args.torchcompile})"
            raise UserError(f"{what}: pass it without a name for inductor") from error
        lines = [gvt_ops.describe_compiled(model, inference=inference, backend=args.torchcompile)]
    with autocast(device, amp_dtype(args, device)):
        lines += gvt_ops.describe(model)
    for line in [*lines, *([threads.describe()] if device.type == "cpu" else [])]:
        log(line)
    return network


def build_networks(
    args: Options, classes: list[str], device: torch.device
) -> tuple[nn.Module, nn.Module, nn.Module, ModelEmaV3 | None]:
    """Return the model, its (compiled) network, the network wrapped for several processes, and the moving average."""
    model = build_model(args, len(classes), pretrained=args.pretrained)
    if args.finetune:
        log(finetune(model, Checkpoint.open(args.finetune), classes=classes, report=args.report))
    freeze_parts(args, model)
    network = compile_model(prepare_model(model, args, device), args)
    parallel = network
    if get_world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        parallel = DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)
    # After DistributedDataParallel has given all processes the weights of the first.
    average = dict(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    ema = ModelEmaV3(model, **average) if args.model_ema else None
    return model, network, parallel, ema
