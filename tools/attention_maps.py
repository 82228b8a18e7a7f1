"""The attention of a Twins, block by block, and attention rollout."""

import gvt

# isort: split
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gvt_ops.window_attention import from_windows, layout, to_windows
from training.errors import UserError

PATCHES = tuple(itertools.accumulate(gvt.PATCHES, int.__mul__))  # pixels that a token of each stage is wide
MOST_BYTES = 4 * 2**30  # of maps


@dataclass(frozen=True)
class BlockMaps:
    """The attention of a block for one image, whose map at this stage has H x W tokens.

    weights: LSA (windows, heads, h * w, h * w), windows row by row; GSA (1, heads, H * W, keys); each row's sum is 1.
    cell: h and w of an LSA window, or the tokens that a key of GSA summarizes.
    """

    stage: int
    block: int
    local: bool
    weights: Tensor
    tokens: tuple[int, int]
    cell: tuple[int, int]

    @property
    def kind(self) -> str:
        return "LSA" if self.local else "GSA"

    def of(self, query: tuple[int, int]) -> Tensor:
        """Return (heads, H, W), the share of each token in what the query (row, column) attends to; its sum is 1.

        LSA: in each window, of the token at the query's place in its window, or the nearest one on the map; the sum of
        each window is 1. GSA: a key's weight is shared by the tokens that it summarizes.
        """
        if not self.local:
            return self.spread(self.weights[0, :, query[0] * self.tokens[1] + query[1]])
        (H, W), (h, w) = self.tokens, self.cell
        starts = itertools.product(range(0, H, h), range(0, W, w))
        places = [min(query[0] % h, H - top - 1) * w + min(query[1] % w, W - left - 1) for top, left in starts]
        rows = self.weights[torch.arange(len(places)), :, torch.tensor(places)]  # (windows, heads, h * w)
        return self.join(rows.transpose(1, 2))

    def relative(self, maps: Tensor) -> Tensor:
        """Return maps (n, H, W), what `of` gave, as shares of their maximum, for LSA of each window's."""
        (H, W), (h, w) = self.tokens, self.cell
        if not self.local:
            return maps / maps.amax((1, 2), keepdim=True)
        peaks = F.max_pool2d(F.pad(maps, (0, -W % w, 0, -H % h)), (h, w))
        return maps / peaks.repeat_interleave(h, 1).repeat_interleave(w, 2)[:, :H, :W]

    def backward(self, share: Tensor) -> Tensor:
        """Return (H, W), the shares of tokens before the attention from those after it, by the mean of the heads."""
        weights = self.weights.mean(1)
        if not self.local:
            return self.spread(share.reshape(1, -1) @ weights[0])[0]
        (H, W), (h, w) = self.tokens, self.cell
        windows = to_windows(F.pad(share, (0, -W % w, 0, -H % h))[None, :, :, None], h, w)  # (windows, h * w, 1)
        return self.join(weights.transpose(1, 2) @ windows)[0]

    def spread(self, keys: Tensor) -> Tensor:
        """(n, keys) -> (n, H, W): tokens beyond the last whole region are no part of a key."""
        (H, W), (h, w) = self.tokens, self.cell
        maps = keys.unflatten(1, (H // h, W // w)) / (h * w)
        maps = maps.repeat_interleave(h, 1).repeat_interleave(w, 2)
        return F.pad(maps, (0, W - maps.shape[2], 0, H - maps.shape[1]))

    def join(self, windows: Tensor) -> Tensor:
        """(windows, h * w, n) -> (n, H, W), without the padding."""
        (H, W), (h, w) = self.tokens, self.cell
        return from_windows(windows, h, w, H + -H % h, W + -W % w)[0, :H, :W].permute(2, 0, 1)


@torch.no_grad()
def attention_maps(model: gvt.Twins, image: Tensor) -> list[BlockMaps]:
    """Return the maps of all blocks, in order, for one normalized image, (3, H, W) or (1, 3, H, W), of any size.

    They are those of the model as it predicts, evaluating, with unfused attention; its modes are as before afterwards.
    On the model's device. Raises UserError if the maps would not fit into memory.
    """
    image = image.reshape(1, *image.shape[-3:])
    maps, seen = empty_maps(model, image.shape[2:]), []
    with _looking(model, seen):
        model(image)
    assert [each.weights.shape for each in maps] == [weights.shape for weights in seen]
    return [BlockMaps(**vars(each) | {"weights": weights}) for each, weights in zip(maps, seen)]


def _blocks(model: gvt.Twins) -> list[tuple[int, int]]:
    return [(stage, block) for stage, blocks in enumerate(model.blocks) for block in range(len(blocks))]


def empty_maps(model: gvt.Twins, size: tuple[int, int]) -> list[BlockMaps]:
    """Return maps with weights on the meta device for images of H x W pixels; raise UserError if they are too large."""
    maps = [_empty(model, size, stage, block) for stage, block in _blocks(model)]
    total = sum(4 * each.weights.numel() for each in maps)
    if total > MOST_BYTES:
        what = f"attention maps of {total / 2**30:.0f} GiB ({size[1]} x {size[0]} pixels)"
        raise UserError(f"{what}: shrink the image, {MOST_BYTES / 2**30:.0f} GiB are the limit")
    return maps


def _empty(model: gvt.Twins, size: tuple[int, int], stage: int, block: int) -> BlockMaps:
    attn = model.blocks[stage][block].attn
    H, W = size
    for patch in gvt.PATCHES[: stage + 1]:
        H, W = H // patch, W // patch
    local = isinstance(attn, gvt.LocalAttention)
    if local:
        h, w = layout(H, W, attn.window, attn.pad)[:2]
        shape = (-(-H // h) * -(-W // w), attn.heads, h * w, h * w)
    else:
        h = w = 1 if attn.sr is None else attn.sr.stride[0]
        shape = (1, attn.heads, H * W, (H // h) * (W // w))
    return BlockMaps(stage, block, local, torch.empty(shape, device="meta"), (H, W), (h, w))


@contextmanager
def _looking(model: gvt.Twins, seen: list[Tensor]) -> Iterator[None]:
    """Evaluate, unfused, and append the weights of each attention to `seen`, in the order of the blocks."""
    attentions = [model.blocks[stage][block].attn for stage, block in _blocks(model)]
    fused, training = [attn.fused_attn for attn in attentions], model.training
    hooks = [attn.attn_drop.register_forward_hook(lambda *call: seen.append(call[-1])) for attn in attentions]
    model.eval().set_fused_attn(False)
    try:
        yield
    finally:
        for hook, attn, was in zip(hooks, attentions, fused):
            hook.remove()
            attn.fused_attn = was
        model.train(training)


def rollout(maps: Sequence[BlockMaps]) -> list[Tensor]:
    """Return for each stage (H, W), the share of its first tokens in the mean of the last ones; the sum is 1.

    Attention rollout (Abnar and Zuidema, 2020): each block passes on half of a token's share, and the other half by
    the mean of its heads. A token of the next stage shares with the 2 x 2 tokens of its patch. Convolutions of the
    position encodings, MLPs and norms are left out, as always in rollout.
    """
    H, W = maps[-1].tokens
    share, shares = torch.full((H, W), 1 / (H * W), device=maps[-1].weights.device), []
    for _, blocks in itertools.groupby(reversed(maps), key=lambda each: each.stage):
        for each in blocks:
            if share.shape != each.tokens:
                share = share.repeat_interleave(2, 0).repeat_interleave(2, 1) / 4
                share = F.pad(share, (0, each.tokens[1] - share.shape[1], 0, each.tokens[0] - share.shape[0]))
            share = (share + each.backward(share)) / 2
        shares.insert(0, share)
    return shares
