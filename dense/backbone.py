"""Twins as the backbone of segmentors and detectors: `type="TwinsBackbone"` in configs of mmsegmentation and
mmdetection.

Importing this file registers it in mmengine's root registry, where both libraries look. The class names of the official
segmentation and detection folders are registered beside it, each in the registry of its library.
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

from training.checkpoint import Checkpoint, load_into
from training.optimizer import first_stages

STAGES = (0, 1, 2, 3)
PARTS = ("patch_embeds", "pos_drops", "blocks", "pos_block", "norm_list")  # lists with an entry for each stage


def warn(message: str) -> None:
    print_log(message, logger="current", level=logging.WARNING)


@MODELS.register_module()
class TwinsBackbone(Twins):
    """(B, 3, H, W) -> maps (B, C_k, H / 2^(k+2), W / 2^(k+2)) of stages k in out_indices. Sides under 32 are padded.

    variant: a key of gvt.VARIANTS. pad: how windows treat what lies outside the map, see gvt.LocalAttention.
    pretrained: a weight file, read by init_weights(), which only a training run from the start calls. frozen_stages:
    the first N stages (embedding, blocks, position encoding, norm of the map) get no gradient and stay in evaluation
    mode, without drop path; -1: none. As in the official code, Twins-SVT has a norm for each map (`norm_list`) and
    PCPVT has none. There is no classifier and no final norm, so every other parameter gets a gradient.
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
        frozen_stages: int = -1,
    ):
        if frozen_stages not in (-1, 1, 2, 3, 4):
            raise ValueError(f"frozen_stages={frozen_stages!r}: expected 1 to 4, or -1 for none")
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is none of {', '.join(VARIANTS)}")
        super().__init__(VARIANTS[variant], num_classes=0, drop_path_rate=drop_path_rate, pad=pad)
        self.variant, self.pretrained = variant, pretrained
        self.out_indices = self.prune_intermediate_layers(list(out_indices), prune_norm=True)
        self.set_grad_checkpointing(grad_checkpointing)
        self.norm_list = None
        if VARIANTS[variant].window is not None:
            dims = VARIANTS[variant].dims[: len(self.blocks)]
            self.norm_list = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)
        accelerate(self)
        self.frozen = first_stages(self, max(frozen_stages, 0))
        if self.norm_list is not None:
            self.frozen += self.norm_list[: max(frozen_stages, 0)]
        for module in self.frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> "TwinsBackbone":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def init_weights(self) -> None:
        """Load the weights of `pretrained`, if given, and log what was loaded, missing and unused."""
        if self.pretrained is None:
            return
        file = Checkpoint.open(self.pretrained)
        state = file.weights()
        pruned = tuple(f"{part}.{stage}." for part in PARTS for stage in STAGES[len(self.blocks) :])
        may_have = ("head.", "norm.", *pruned)
        load_into(
            self, state, source=file.source, may_lack=("norm_list.",), may_have=may_have, lists_all="TWINS_DEBUG=1"
        )
        own = self.state_dict()
        missing, unused = own.keys() - state.keys(), state.keys() - own.keys()
        loaded = f"loaded {len(own) - len(missing)} of {len(own)} tensors from {file.source}"
        rest = f"missing in the file, randomly initialized: {parts_of(missing, own)}"
        warn(f"{self.variant}: {loaded}; {rest}; in the file, not used: {parts_of(unused, state)}")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, max(0, SMALLEST - width), 0, max(0, SMALLEST - height)))
        maps = self.forward_maps(x, self.out_indices, norms=self.norm_list)
        return tuple(each.permute(0, 3, 1, 2).contiguous() for each in maps)


def parts_of(names: set[str], order: dict[str, Tensor]) -> str:
    """Return the parts of a model that some of its tensors belong to, in the model's order."""
    return ", ".join(dict.fromkeys(name.split(".")[0] for name in order if name in names)) or "nothing"


# ---------------------------------------------------------------- the official class names

# Keys that the official configs inherit from a ResNet's, or set, and that the official classes never read.
UNREAD = {"depth", "num_stages", "out_indices", "norm_cfg", "norm_eval", "style"}
# By library: unread keys, padding, the variants whose drop path is not DROP_PATH, and names that are not the variant's
OFFICIAL = {
    "mmseg": dict(
        unread=UNREAD | {"dilations", "strides", "contract_dilation", "drop_path_rate"},
        pad="mask",
        drop_path={"alt_gvt_large": 0.3},
        names=dict(pcpvt_small="pcpvt_small_v0", pcpvt_base="pcpvt_base_v0"),
    ),
    "mmdet": dict(unread=UNREAD | {"frozen_stages"}, pad="zero", drop_path={}, names={}),
}
DROP_PATH = 0.2


def official_drop_path(library: str, variant: str) -> float:
    """Return the drop path of a variant's official run, which its class set, whatever the config said."""
    return OFFICIAL[library]["drop_path"].get(variant, DROP_PATH)


def register_official(registry: Registry, library: str, variant: str) -> None:
    """Register a variant under its official class name, with the padding and the drop path of that class."""
    facts, rate = OFFICIAL[library], official_drop_path(library, variant)

    def build(*, pretrained: str | None = None, **options) -> TwinsBackbone:
        ignored = {key: options.pop(key) for key in sorted(facts["unread"] & options.keys())}
        if ignored:
            keys = ", ".join(f"{key}={value!r}" for key, value in ignored.items())
            advice = f"for a drop path other than {rate}, use type='TwinsBackbone'"
            warn(f"{build.__name__}: ignored, as in the official code: {keys}; {advice}")
        return TwinsBackbone(variant, drop_path_rate=rate, pad=facts["pad"], pretrained=pretrained, **options)

    build.__name__ = build.__qualname__ = facts["names"].get(variant, variant)
    registry.register_module(module=build)


for _library in OFFICIAL:
    if importlib.util.find_spec(_library):
        for _variant in VARIANTS:
            if _variant != "alt_gvt_demo":
                register_official(importlib.import_module(f"{_library}.registry").MODELS, _library, _variant)
