"""Rename weights from and to the formats of other libraries: official, timm, mmsegmentation, mmpretrain.

The official names are the common ones: `to_official` reads a file's names, `from_official` writes them. Values are
never changed, only joined and split where mmsegmentation keeps q, k and v of a GSA block in one tensor. timm's names
are the official ones in another order.

A rule is (official, theirs): the module at the front of a name, * for a number.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from gvt import VARIANTS, Twins
from training.errors import UserError

FORMATS = ("published", "timm", "mmseg", "mmpretrain", "safetensors", "hub")

MMSEG = (
    ("patch_embeds.*.proj", "patch_embeds.*.projection"),
    ("pos_block.*.proj.0", "position_encodings.*.proj"),
    ("blocks.*.*.norm1", "layers.*.*.norm1"),
    ("blocks.*.*.attn", "layers.*.*.attn"),
    ("blocks.*.*.norm2", "layers.*.*.norm2"),
    ("blocks.*.*.mlp.fc1", "layers.*.*.ffn.layers.0.0"),
    ("blocks.*.*.mlp.fc2", "layers.*.*.ffn.layers.1"),
)
MMPRETRAIN = (
    *((official, re.sub("^layers", "stages", theirs)) for official, theirs in MMSEG),
    ("norm", "norm_after_stage3"),
    ("head", "head.fc"),
)
BACKBONE = "backbone."
# What stands beside the backbone in files of segmentors and detectors.
HEADS = ("decode", "auxiliary", "rpn", "roi", "bbox", "mask")
OTHER_PARTS = ("neck.", "data_preprocessor.", *(f"{kind}_head." for kind in HEADS))
# What a network may lack: the classifier, the final norm (in mmsegmentation), the norms of stages (all but dense SVT).
OPTIONAL = ("head.", "norm.", "norm_list.")
# What the networks of a format never have.
NOT_HELD = {"mmseg": ("head.",), "timm": ("norm_list.",), "hub": ("norm_list.",), "mmpretrain": ("norm_list.",)}

TIMM_ORDER = ("patch_embeds", "blocks", "pos_block", "norm", "head")
TIMM_BLOCK_ORDER = ("norm1", "attn", "norm2", "mlp")


def to_official(state: Mapping[str, Tensor], *, source: str) -> tuple[dict[str, Tensor], str, list[str]]:
    """Return a file's tensors by their official names, the file's format, and the names that are left out.

    Parts of a segmentor or detector other than the backbone are left out. A name that no rule knows stays as it is, and
    so do official names. Raises UserError if two tensors would get one name.
    """
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    left_out, fmt = [], "published"
    if any(name.startswith(BACKBONE) for name in state):
        fmt = "dense"
        left_out = [name for name in state if name.startswith(OTHER_PARTS)]
        backbone = {name: value for name, value in state.items() if not name.startswith(OTHER_PARTS)}
        state = _renamed(backbone, lambda name: name.removeprefix(BACKBONE), source=source)
    blocks = [found[0] for name in state if (found := re.match(r"(layers|stages|blocks)(?=\.[0-9]+\.[0-9]+\.)", name))]
    # Not the first: a strange name does not change how the others are read.
    usual = max(set(blocks), key=blocks.count, default="blocks")
    if usual != "blocks":
        fmt, rules = ("mmseg", MMSEG) if usual == "layers" else ("mmpretrain", MMPRETRAIN)
        inverse = [(theirs, official) for official, theirs in rules]
        state = _split(state) if fmt == "mmseg" else state
        state = _renamed(state, lambda name: _rename(name, inverse), source=source)
    return dict(state), fmt, left_out


def from_official(
    state: Mapping[str, Tensor], fmt: str, *, source: str, no_head: bool = False
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Official names -> the same tensors by the names of `fmt`, in its order; the names that it does not hold; and
    what else to know.

    fmt is one of FORMATS; all but mmseg are for classification. Raises UserError where the weights are no Twins, or
    where they lack what a classifier has and no_head is not given. no_head also leaves a classifier out.
    """
    variant = variant_of(state, source=source)
    lacking = [what for what, part in (("classifier", "head"), ("final norm", "norm")) if f"{part}.weight" not in state]
    if fmt == "hub" and "final norm" in lacking:
        raise UserError(f"no final norm ({source}): a hub folder is for timm, which needs it, use another format")
    order = {name: rank for rank, name in enumerate(_shapes(variant))}
    if lacking and fmt != "mmseg" and not no_head:
        raise UserError(f"no {' and no '.join(lacking)} ({source}): give --no-head to write {fmt} weights without")
    absent = NOT_HELD.get(fmt, ()) + (("head.",) if no_head else ())
    names = sorted(state, key=order.get)
    left_out = [name for name in names if name.startswith(absent)]
    held = {name: state[name] for name in names if not name.startswith(absent)}
    notes = [f"no {what} in the source" for what in lacking if fmt != "mmseg"]
    if fmt in ("timm", "hub"):
        held = {name: held[name] for name in sorted(held, key=_timm_rank)}
    elif fmt == "mmseg":
        if "norm.weight" in held:
            notes.append("norm is kept, as by mmsegmentation's converter; its models have none: load with strict=False")
        held = _renamed(_joined(held, source=source), lambda name: _rename(name, MMSEG), source=source)
    elif fmt == "mmpretrain":
        held = _renamed(held, _to_mmpretrain, source=source)
    return held, left_out, notes


def variant_of(state: Mapping[str, Tensor], *, source: str = "these weights") -> str:
    """Return the key of gvt.VARIANTS whose network has these official names and shapes; raise UserError if none has.

    Any number of classes and of input channels. The parts in OPTIONAL may be absent, each as a whole.
    """
    wrong = {}
    for key in VARIANTS:
        expected = _expected(key, state)
        differences = {
            "missing": [name for name in expected if name not in state],
            "unknown": [name for name in state if name not in expected],
            "of another shape": [name for name in expected if name in state and expected[name] != state[name].shape],
            "of whole numbers": [name for name in expected if name in state and not state[name].is_floating_point()],
        }
        wrong[key] = {kind: names for kind, names in differences.items() if names}
        if not wrong[key]:
            return key
    nearest = min(wrong, key=lambda key: sum(map(len, wrong[key].values())))
    first = {kind: ", ".join(name[:60] for name in names[:3]) for kind, names in wrong[nearest].items()}
    parts = "; ".join(f"{len(wrong[nearest][kind])} {kind} ({names})" for kind, names in first.items())
    raise UserError(f"these weights are no Twins ({source}): {nearest} is nearest, with {parts}: is it the right file?")


# ---------------------------------------------------------------- names


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for old, new in rules:
        found = re.fullmatch(re.escape(old).replace(r"\*", "([0-9]+)") + r"(\..+)", name)
        if found:
            *numbers, rest = found.groups()
            for number in numbers:
                new = new.replace("*", number, 1)
            return new + rest
    return name


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str], *, source: str) -> dict[str, Tensor]:
    """Return the same tensors by other names, in the same order."""
    new = {}
    for old, value in state.items():
        name = rename(old)
        if name in new:
            raise UserError(f"two tensors for one weight ({source}, {name}): expected one network in the file")
        new[name] = value
    return new


def _to_mmpretrain(name: str) -> str:
    return _rename(name, MMPRETRAIN) if name.startswith("head.") else BACKBONE + _rename(name, MMPRETRAIN)


def _timm_rank(name: str) -> tuple[int, ...]:
    """Return the rank of an official name in timm's order; equal ranks, of one module, are in timm's order already."""
    part, *rest = name.split(".")
    rank = (TIMM_ORDER.index(part),)
    return (*rank, int(rest[0]), int(rest[1]), TIMM_BLOCK_ORDER.index(rest[2])) if part == "blocks" else rank


# ---------------------------------------------------------------- q, k and v in one tensor


def _joined(state: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Official names -> the same but for GSA blocks, which keep q over kv as attn.attn.in_proj_*, and proj as
    attn.attn.out_proj.
    """
    joined = {}
    for name, value in state.items():
        block, found, leaf = name.rpartition(".attn.")
        module, _, kind = leaf.partition(".")  # kind: weight or bias
        if found and f"{block}.attn.q.weight" in state:
            if module == "q":
                kv = state[f"{block}.attn.kv.{kind}"]
                if kv.dtype != value.dtype:
                    types = f"{value.dtype} and {kv.dtype} do not fit in one tensor"
                    raise UserError(f"q and kv differ in type ({source}, {name}): {types}")
                name, value = f"{block}.attn.attn.in_proj_{kind}", torch.cat([value, kv])
            elif module == "kv":
                continue
            elif module == "proj":
                name = f"{block}.attn.attn.out_proj.{kind}"
        joined[name] = value
    return joined


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert _joined, for names with any front. in_proj_*: (3C, ...) -> q (C, ...) and kv (2C, ...), both copied."""
    split = {}
    for name, value in state.items():
        block, found, leaf = name.rpartition(".attn.attn.")
        if found and leaf in ("in_proj_weight", "in_proj_bias") and value.dim() and value.shape[0] % 3 == 0:
            kind, dim = leaf.removeprefix("in_proj_"), value.shape[0] // 3
            for module, rows in (("q", value[:dim]), ("kv", value[dim:])):
                split[f"{block}.attn.{module}.{kind}"] = rows.clone(memory_format=torch.contiguous_format)
        elif found and leaf.startswith("out_proj."):
            split[f"{block}.attn.{leaf.removeprefix('out_')}"] = value
        else:
            split[name] = value
    return split


# ---------------------------------------------------------------- what a network holds


@functools.cache
def _shapes(key: str) -> dict[str, torch.Size]:
    """Return official names, in the order of registration, and shapes of a network with every part it can have."""
    with torch.device("meta"):
        model = Twins(VARIANTS[key])
        model.norm_list = nn.ModuleList(map(nn.LayerNorm, VARIANTS[key].dims))
    return {name: value.shape for name, value in model.state_dict().items()}


def _expected(key: str, state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shapes of a variant with the optional parts, the classes and the input channels of `state`."""
    absent = tuple(part for part in OPTIONAL if not any(name.startswith(part) for name in state))
    shapes = {name: shape for name, shape in _shapes(key).items() if not name.startswith(absent)}
    for names, axis in ((("head.weight", "head.bias"), 0), (("patch_embeds.0.proj.weight",), 1)):
        size = state[names[0]].shape[axis : axis + 1] if names[0] in state else ()
        for name in names if size and names[0] in shapes else ():
            shapes[name] = torch.Size((*shapes[name][:axis], *size, *shapes[name][axis + 1 :]))
    return shapes
