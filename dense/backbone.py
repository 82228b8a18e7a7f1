"""Twins as the backbone of segmentors and detectors, known to mmsegmentation and mmdetection by `type="TwinsBackbone"`.

Importing this file registers it once, in mmengine's root registry, where both libraries look. The class names of the
published segmentation and detection folders are registered beside it, in the registry of the library that each folder
was written for.
"""

from gvt import SMALLEST, VARIANTS, Twins
from gvt_ops import accelerate

# isort: split
import importlib
import importlib.util
import logging
from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.registry import MODELS, Registry
from torch import Tensor, nn

from training import checkpoint

STAGES = (0, 1, 2, 3)
PARTS = ("patch_embeds", "pos_drops", "blocks", "pos_block")  # lists with an entry for each stage


def say(message: str) -> None:
    print_log(message, logger="current", level=logging.WARNING)


@MODELS.register_module()
class TwinsBackbone(Twins):
    """(B, 3, H, W) -> the maps (B, C_k, H / 2^(k+2), W / 2^(k+2)) of the stages k in out_indices. A side under 32 is
    padded to 32.

    variant: a key of gvt.VARIANTS. pad: what a window does beyond the map, see gvt.LocalAttention. pretrained: a file
    of weights, read by init_weights(), which a training from the start calls and nothing else. Twins-SVT has a norm for
    each map (`norm_list`), PCPVT has none, as published. There is no classifier and no final norm, so that every
    parameter gets a gradient.
    """

    def __init__(
        self,
        variant: str,
        *,
        drop_path_rate: float,
        pad: str = "mask",
        out_indices: Sequence[int] = STAGES,
        pretrained: str | None = None,
        grad_checkpointing: bool = False,
    ):
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is none of {', '.join(VARIANTS)}")
        super().__init__(VARIANTS[variant], num_classes=0, drop_path_rate=drop_path_rate, pad=pad)
        self.variant, self.pretrained = variant, pretrained
        self.out_indices = self.prune_intermediate_layers(list(out_indices), prune_norm=True)
        self.set_grad_checkpointing(grad_checkpointing)
        self.norm_list = None
        if VARIANTS[variant].window is not None:
            self.norm_list = nn.ModuleList(
                nn.LayerNorm(dim, eps=1e-6) for dim in VARIANTS[variant].dims[: len(self.blocks)]
            )
        accelerate(self)

    def init_weights(self) -> None:
        """Take the weights of `pretrained`, if there is one, and say what was and what was not in it."""
        if self.pretrained is None:
            return
        state = checkpoint.weights(checkpoint.load(self.pretrained), source=self.pretrained)
        pruned = tuple(f"{part}.{stage}." for part in (*PARTS, "norm_list") for stage in STAGES[len(self.blocks) :])
        unused = ("head.", "norm.", *pruned)
        checkpoint.load_into(
            self, state, source=self.pretrained, may_lack=("norm_list.",), may_have=unused, lists_all="TWINS_DEBUG=1"
        )
        own = self.state_dict()
        fresh, left = [name for name in own if name not in state], [name for name in state if name not in own]
        found = f"{len(own) - len(fresh)} of {len(own)} tensors from {self.pretrained}"
        say(
            f"{self.variant}: {found}; not in it, so left fresh: {parts_of(fresh)}; in it, but not used: "
            f"{parts_of(left)}"
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, max(0, SMALLEST - width), 0, max(0, SMALLEST - height)))
        maps = self.forward_maps(x, self.out_indices, norms=self.norm_list)
        return tuple(each.permute(0, 3, 1, 2).contiguous() for each in maps)


def parts_of(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(name.split(".")[0] for name in names)) or "nothing"


# ---------------------------------------------------------------- the published class names

# What the published configs inherit from a ResNet's, or write, and what the published classes never read.
LEFTOVERS = {"depth", "num_stages", "out_indices", "norm_cfg", "norm_eval", "style"}
# library: leftovers, padding, drop path (of all, and of the exceptions), and the published names of our variants
PUBLISHED = {
    "mmseg": dict(
        leftovers=LEFTOVERS | {"dilations", "strides", "contract_dilation", "drop_path_rate"},
        pad="mask",
        drop_path={"alt_gvt_large": 0.3},
        names=dict(pcpvt_small="pcpvt_small_v0", pcpvt_base="pcpvt_base_v0"),
    ),
    "mmdet": dict(leftovers=LEFTOVERS | {"frozen_stages"}, pad="zero", drop_path={}, names={}),
}
DROP_PATH = 0.2


def published_drop_path(library: str, variant: str) -> float:
    """What the published run of a variant had, whatever its config said: the classes held it, and differ in one."""
    return PUBLISHED[library]["drop_path"].get(variant, DROP_PATH)


def register_published(registry: Registry, library: str, variant: str) -> None:
    """Register a variant under its published class name, with the padding and the drop path that this class had."""
    facts = PUBLISHED[library]
    rate = published_drop_path(library, variant)

    def build(*, pretrained: str | None = None, **others) -> TwinsBackbone:
        dropped = {key: others.pop(key) for key in sorted(facts["leftovers"] & others.keys())}
        if dropped:
            words = ", ".join(f"{key}={value!r}" for key, value in dropped.items())
            say(
                f"{build.__name__}: without effect, as published: {words} (drop path is {rate}; type='TwinsBackbone' "
                "takes another)"
            )
        return TwinsBackbone(variant, drop_path_rate=rate, pad=facts["pad"], pretrained=pretrained, **others)

    build.__name__ = build.__qualname__ = facts["names"].get(variant, variant)
    registry.register_module(module=build)


for _library in PUBLISHED:
    if importlib.util.find_spec(_library):
        for _variant in VARIANTS:
            if _variant != "alt_gvt_demo":
                register_published(importlib.import_module(f"{_library}.registry").MODELS, _library, _variant)
