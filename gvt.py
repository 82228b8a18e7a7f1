"""Twins: Revisiting the Design of Spatial Attention in Vision Transformers (Chu et al., NeurIPS 2021,
arXiv:2104.13840).

PCPVT is PVT with conditional position encodings (section 3.1); ALTGVT, the paper's Twins-SVT, alternates attention
inside windows (LSA) with attention to a sub-sampled map (GSA) (section 3.2). The file reads from top to bottom: the
table of models, the two attentions, a block, a stage, the network, and the names that timm knows the models by.

Names of modules, and the order in which they are registered, are those of the official weights and optimizer states.

Shapes: B images; a map of H x W tokens, kept as (B, H, W, C); N queries, M keys; D channels of a head.
"""

import gvt_ops  # noqa: F401  before timm: lets torchvision be imported beside a CPU build of torch

# isort: split
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, use_fused_attn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gvt_ops import loading
from gvt_ops.attention import attention
from gvt_ops.window_attention import pad_to_windows, window_attention

PATCHES = (4, 2, 2, 2)  # side of the patches that each stage embeds
SMALLEST = 32  # pixels: below it, the last stage has no token
PADS = ("mask", "zero", "published")
RECOMPUTED = ("block", "mlp")

# What depends on sizes and devices: torch.fx keeps these as calls, and does not look inside.
for _name in ("attention", "pad_to_windows", "window_attention", "check_size"):
    torch.fx.wrap(_name)


@dataclass(frozen=True)
class Variant:
    """One model. The tuples have an entry for each stage."""

    dims: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    depths: tuple[int, ...]
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)  # GSA keeps one key for each r x r tokens
    window: int | None = None  # side of an LSA window; None: GSA in every block (PCPVT)
    timm: str | None = None  # timm's name for the same model, under which its hub keeps the official weights


# Tables 7 to 10 of the paper, as the official code and weights have them (Table 9 gives PCPVT-S and -B a depth of 3 in
# stage 2). Keys are the names of the official weight files.
VARIANTS = {
    "pcpvt_small": Variant((64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), (3, 4, 6, 3), timm="twins_pcpvt_small"),
    "pcpvt_base": Variant((64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), (3, 4, 18, 3), timm="twins_pcpvt_base"),
    "pcpvt_large": Variant((64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), (3, 8, 27, 3), timm="twins_pcpvt_large"),
    "alt_gvt_small": Variant(
        (64, 128, 256, 512), (2, 4, 8, 16), (4, 4, 4, 4), (2, 2, 10, 4), window=7, timm="twins_svt_small"
    ),
    "alt_gvt_base": Variant(
        (96, 192, 384, 768), (3, 6, 12, 24), (4, 4, 4, 4), (2, 2, 18, 2), window=7, timm="twins_svt_base"
    ),
    "alt_gvt_large": Variant(
        (128, 256, 512, 1024), (4, 8, 16, 32), (4, 4, 4, 4), (2, 2, 18, 2), window=7, timm="twins_svt_large"
    ),
    # Not in the paper: a small model of the same design for the demo and the tests. It has no official weights.
    "alt_gvt_demo": Variant((32, 64, 128, 256), (1, 2, 4, 8), (4, 4, 4, 4), (2, 2, 2, 2), window=7),
}

# The names of the classification models, the official ones first, and their keys of VARIANTS.
MODEL_NAMES = {"pcpvt_small_v0": "pcpvt_small", "pcpvt_base_v0": "pcpvt_base", "pcpvt_large_v0": "pcpvt_large"} | {
    name: name for name in ("alt_gvt_small", "alt_gvt_base", "alt_gvt_large", "alt_gvt_demo")
}


class LocalAttention(nn.Module):
    """LSA: attention inside windows of window x window tokens, without overlap or shift (section 3.2).

    (B, H, W, C) -> same. A map whose sides are no multiples of the window is padded on the right and below. pad="mask":
    padding is never a key. pad="zero": zeros are added before the projection to keys, so that padding is a key like
    others (official detection, timm). pad="published": as "mask", but as "zero" where only one side needs padding
    (official segmentation, an error in a slice).
    """

    def __init__(
        self, dim: int, heads: int, *, window: int, pad: str = "mask", attn_drop: float = 0.0, proj_drop: float = 0.0
    ):
        super().__init__()
        self.heads, self.window, self.pad = heads, window, pad
        self.fused_attn, self.accelerated = use_fused_attn(), False
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        windows = dict(window=self.window, pad=self.pad, heads=self.heads, dropout=self.attn_drop)
        windows |= dict(fused=self.fused_attn, accelerated=self.accelerated)
        qkv = self.qkv(pad_to_windows(x, **windows))  # (B * windows, N, 3 * C)
        return self.proj_drop(self.proj(window_attention(qkv, x.shape, **windows)))


class GlobalAttention(nn.Module):
    """GSA: every token attends to a map sub-sampled sr_ratio times by a strided convolution (section 3.2, from PVT).

    (B, H, W, C) -> same. Rows and columns beyond a multiple of sr_ratio are never keys.
    """

    def __init__(self, dim: int, heads: int, *, sr_ratio: int, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.heads = heads
        self.fused_attn, self.accelerated = use_fused_attn(), False
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.sr, self.norm = None, None
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)  # eps 1e-5, unlike the blocks' norms, as in the official code

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        q = self.q(x).reshape(B, H * W, self.heads, C // self.heads).transpose(1, 2)  # (B, heads, N, D)
        if self.sr is not None:
            x = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (B, H/r, W/r, C)
        kv = self.kv(x.flatten(1, 2)).unflatten(-1, (2, self.heads, C // self.heads)).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)  # each (B, heads, M, D)
        x = attention(q, k, v, dropout=self.attn_drop, fused=self.fused_attn, accelerated=self.accelerated)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, H, W, C)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), both with drop path (section 3.2, eq. 2). (B, H, W, C) -> same."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, *, drop_path: float, order: tuple[str, ...]):
        super().__init__()
        parts = dict(norm1=nn.LayerNorm(dim, eps=1e-6), attn=attn, norm2=nn.LayerNorm(dim, eps=1e-6), mlp=mlp)
        for name in order:
            self.add_module(name, parts[name])
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.recompute_mlp = False

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if self.recompute_mlp and self.training:
            return x + self.drop_path(checkpoint(self.normed_mlp, x, use_reentrant=False))
        return x + self.drop_path(self.normed_mlp(x))

    def normed_mlp(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))


class Stage(nn.ModuleList):
    """The blocks of a stage, with the position encoding after the first one (section 3.1).

    (B, H, W, C) -> (B, C, H, W), which the next patch embedding takes.
    """

    grad_checkpointing = False

    def forward(self, x: Tensor, peg: nn.Module) -> Tensor:
        for index, block in enumerate(self):
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and self.training else block(x)
            if index == 0:
                x = peg(x)
        return x.permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, projected and normed. (B, C, H, W) -> (B, H/patch, W/patch, dim), rounded down."""

    def __init__(self, in_chans: int, dim: int, *, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(dim)  # eps 1e-5, as in GlobalAttention

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PEG(nn.Module):
    """Position encoding generator: x + depthwise 3 x 3 conv of x (CPVT, arXiv:2102.10882). (B, H, W, C) -> same."""

    def __init__(self, dim: int):
        super().__init__()
        conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        # In the memory format of its input, and so of its gradient, which DistributedDataParallel asks for. The
        # Sequential is in the official keys.
        self.proj = nn.Sequential(conv.to(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def init_weights(module: nn.Module) -> None:
    """Draw initial weights as the official code does: linear N(0, 0.02^2), convolution N(0, 2 / fan_out) with fan_out =
    k * k * out / groups.
    """
    if isinstance(module, nn.Linear):
        # The official code truncates at 100 standard deviations, which never matters, with a sampler that at times
        # returns the bound itself.
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
        nn.init.zeros_(module.bias)


def check_size(x: Tensor) -> Tensor:
    """Return images that are large enough; raise ValueError for others."""
    H, W = x.shape[-2:]
    if min(H, W) < SMALLEST:
        raise ValueError(f"images are {H} x {W} pixels: Twins needs at least {SMALLEST} x {SMALLEST}")
    return x


class Twins(nn.Module):
    """A Twins network for classification, or for feature maps through forward_maps and forward_intermediates.

    Images are (B, in_chans, H, W) of any size from 32 x 32. drop_path_rate is the last block's; it grows linearly
    from 0 in the first. drop_rate holds after the patch embeddings, attentions and MLP layers. num_classes=0: no
    classifier. global_pool is "avg", or "" for logits of each token. pad: see LocalAttention.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pad: str = "mask",
    ):
        super().__init__()
        if pad not in PADS:
            raise ValueError(f"pad={pad!r} is none of {', '.join(PADS)}")
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = variant.dims[-1]
        self.feature_info = [
            dict(module=f"blocks.{k}", num_chs=dim, reduction=4 * 2**k) for k, dim in enumerate(variant.dims)
        ]
        self.grad_checkpointing = False
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(variant.depths), device="cpu").tolist())
        order = ("patch_embeds", "blocks", "norm", "head", "pos_block")
        block_order = ("norm1", "attn", "norm2", "mlp")
        local = variant.window is not None
        if local:  # the official SVT registers a block's attention after its MLP, and its blocks after the head
            order = ("patch_embeds", "norm", "head", "pos_block", "blocks")
            block_order = ("norm1", "norm2", "mlp", "attn")

        def block(stage: int, index: int) -> Block:
            dim, heads = variant.dims[stage], variant.heads[stage]
            rates = dict(attn_drop=attn_drop_rate, proj_drop=drop_rate)
            if local and index % 2 == 0:
                attn = LocalAttention(dim, heads, window=variant.window, pad=pad, **rates)
            else:
                attn = GlobalAttention(dim, heads, sr_ratio=variant.sr_ratios[stage], **rates)
            mlp = Mlp(dim, dim * variant.mlp_ratios[stage], drop=drop_rate)
            return Block(dim, attn, mlp, drop_path=next(drop_paths), order=block_order)

        channels = (in_chans, *variant.dims)
        parts = {
            "patch_embeds": nn.ModuleList(
                PatchEmbed(channels[k], dim, patch=PATCHES[k]) for k, dim in enumerate(variant.dims)
            ),
            "blocks": nn.ModuleList(
                Stage(block(stage, index) for index in range(depth)) for stage, depth in enumerate(variant.depths)
            ),
            "norm": nn.LayerNorm(self.num_features, eps=1e-6),
            "head": nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity(),
            "pos_block": nn.ModuleList(PEG(dim) for dim in variant.dims),
        }
        for name in order:
            self.add_module(name, parts[name])
        self.pos_drops = nn.ModuleList(nn.Dropout(drop_rate) for _ in variant.dims)
        self.apply(init_weights)

    def forward_maps(
        self, x: Tensor, indices: Sequence[int], *, norms: Sequence[nn.Module] | None = None
    ) -> list[Tensor]:
        """(B, in_chans, H, W) -> the maps (B, H / 2^(k+2), W / 2^(k+2), C_k) of stages k in `indices`, in order, before
        the final norm.

        norms: one for each stage, applied to its map, which goes on to the next stage so (official SVT for dense
        tasks).
        """
        x, maps = check_size(x), []
        stages = zip(self.patch_embeds, self.pos_drops, self.blocks, self.pos_block)
        for stage, (embed, drop, blocks, peg) in enumerate(stages):
            x = drop(embed(x))  # (B, C, H, W) -> (B, H/p, W/p, C')
            x = blocks(x, peg)  # (B, C', H/p, W/p)
            if norms is not None:
                x = norms[stage](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            if stage in indices:
                maps.append(x.permute(0, 2, 3, 1))
            if stage == max(indices):
                break
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the normed tokens of the last stage, (B, H/32 * W/32, C)."""
        (x,) = self.forward_maps(x, (len(self.blocks) - 1,))
        return self.norm(x).flatten(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, C) -> logits (B, num_classes), or what the classifier is given."""
        if self.global_pool:
            x = x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's interface to the stages' maps: the last tokens as forward_features gives them, and the maps of
        `indices`.

        indices: which stages (negative: from the end), an int for the last n, None for all. norm: apply the final norm
        to the last stage's map. stop_early: go no further than the last index; with intermediates_only.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} is none of NCHW, NHWC")
        wanted, last = self._stages(indices), len(self.blocks) - 1
        maps = self.forward_maps(x, wanted if stop_early and intermediates_only else sorted({*wanted, last}))
        final = self.norm(maps[-1]) if not intermediates_only or (norm and last in wanted) else None
        taken = dict(zip(sorted({*wanted, last}), maps))
        if norm and last in wanted:
            taken[last] = final
        found = [taken[k] if output_fmt == "NHWC" else taken[k].permute(0, 3, 1, 2) for k in sorted(wanted)]
        return found if intermediates_only else (final.flatten(1, 2), found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps of `indices` do not need: later stages, and the final norm and classifier as asked.
        Returns the stages.
        """
        wanted = self._stages(indices)
        keep = max(wanted) + 1
        shorter = keep < len(self.blocks)
        for name in ("patch_embeds", "pos_drops", "blocks", "pos_block"):
            setattr(self, name, getattr(self, name)[:keep])
        self.num_features = self.head_hidden_size = self.feature_info[keep - 1]["num_chs"]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return wanted

    def _stages(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.blocks)
        if indices is None or isinstance(indices, int):
            indices = range(-count if indices is None else -indices, 0)
        stages = [index + count if index < 0 else index for index in indices]
        if not stages or not all(0 <= stage < count for stage in stages):
            raise ValueError(f"indices {list(indices)}: expected stages 0 to {count - 1}, or -{count} to -1")
        return stages

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier with a new one for num_classes classes, 0 for none."""
        like = next(self.parameters())
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(init_weights).to(device=like.device, dtype=like.dtype).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beside biases and norms: the position encoding generators."""
        return {f"pos_block.{name}" for name, _ in self.pos_block.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns of timm's layer-wise groups: by stage (coarse) or by block, the final norm last."""
        blocks = [(r"^blocks\.(\d+)\.(\d+)", None), (r"^(?:patch_embeds|pos_block)\.(\d+)", (0,))]
        if coarse:
            blocks = [(r"^(?:patch_embeds|blocks|pos_block)\.(\d+)", None)]
        return dict(stem=r"^patch_embeds\.0", blocks=[*blocks, (r"^norm", (99999,))])

    def set_grad_checkpointing(self, enable: bool = True, part: str = "block") -> None:
        """Recompute activations in the backward pass: less memory, one more forward pass of each block, or (part="mlp")
        of its MLP alone.
        """
        if part not in RECOMPUTED:
            raise ValueError(f"part={part!r} is none of {', '.join(RECOMPUTED)}")
        self.grad_checkpointing = enable and part == "block"
        for stage in self.blocks:
            stage.grad_checkpointing = self.grad_checkpointing
            for block in stage:
                block.recompute_mlp = enable and part == "mlp"

    def set_fused_attn(self, enable: bool = True) -> None:
        """Use fused attention, or (False) unfused attention, for export and for looking at attention maps."""
        for module in self.modules():
            if isinstance(module, (LocalAttention, GlobalAttention)):
                module.fused_attn = enable


def _cfg(variant: Variant) -> dict:
    weights = dict(hf_hub_id=f"timm/{variant.timm}.in1k", license="apache-2.0") if variant.timm else {}
    return dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=None,
        crop_pct=0.875,  # what the paper's numbers were measured with; timm's own entry for these weights says 0.9
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embeds.0.proj",
        classifier="head",
        **weights,
    )


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k" if VARIANTS[key].timm else name: _cfg(VARIANTS[key]) for name, key in MODEL_NAMES.items()}
)


def _register(name: str, variant: Variant) -> None:
    def entry(pretrained: bool = False, **kwargs) -> Twins:
        build = dict(
            variant=name,
            pretrained=pretrained,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
            kwargs_filter=("img_size",),  # what timm's models take; these take images of any size
        )
        with loading.hub_errors(name, variant.timm, pretrained=pretrained):
            return build_model_with_cfg(lambda **options: Twins(variant, **options), **build, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name}: see VARIANTS. Options are those of Twins, and timm's."
    globals()[name] = register_model(entry)


for _name, _key in MODEL_NAMES.items():
    _register(_name, VARIANTS[_key])


def load(path: str, device: str = "cpu") -> tuple[nn.Module, Callable[..., Tensor], list[str] | None]:
    """Return the model of a checkpoint, in evaluation mode; the transform of an RGB image of PIL to (3, H, W), as in
    its evaluation; and the names of the classes, ImageNet's for 1000 without names, None if unknown.

    The file is main.py's or the official code's, or weights alone, also as safetensors. Nothing in it is run. Raises
    OSError if it cannot be read, ValueError if it is corrupt or holds no classifier.
    """
    return loading.load(path, device, {name: VARIANTS[key] for name, key in MODEL_NAMES.items()})
