"""All that is used of torch without a public name. A test fails for each that changes."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim, ExportedProgram
from torch.nn.modules.module import _has_any_global_hook

# oneDNN's linear layer with what comes after it: (x, weight, bias, "none" or "gelu", [], "" or "none" or "tanh") -> y.
# torch's compiler emits it too, but by itself for half precision only. None: this torch is built without oneDNN.
LINEAR_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


# Under torch.compile the first of them is an object even where there is no transform. So the compiler asks here, once,
# while it traces; it guards what it compiled by these two itself.
@torch.compiler.assume_constant_result
def in_transform() -> bool:
    """Return True inside a transform of torch.func (vmap, grad, ...) or forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def has_hooks(module: nn.Module) -> bool:
    """Return True if a call of the module does more than its class says: a hook, or a replaced forward."""
    replaced = "forward" in vars(module)
    return replaced or _has_any_global_hook() or any(getattr(module, kind) for kind in HOOKS)


def export(network: nn.Module, x: Tensor, dims: tuple[int, ...], smallest: int) -> ExportedProgram:
    """torch.export of a network whose input's `dims` vary: 0, the batch, from 1 and the others from `smallest` up.

    The program's own guards are stricter: they ask for sizes above 1 everywhere inside. Run .module(check_guards=False)
    of it.
    """
    # Otherwise the tracer asks whether sizes are 0 or 1, and fixes the answers.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(network, (x,), dynamic_shapes=(dict.fromkeys(dims, Dim.AUTO),))
    limits = program.range_constraints
    for size, values in limits.items():
        if values.lower > 2:  # a batch of 1 passes 2
            limits[size] = type(values)(smallest, values.upper)
    return program
