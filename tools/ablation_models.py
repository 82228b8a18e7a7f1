"""Twins with other attention patterns and position encodings, for tools.ablation and for Table 5 of the paper.

python -m tools.ablation_models ARGUMENTS runs main.py, as it is, with the models of DESIGNS registered in timm.
"""

from gvt import GlobalAttention, LocalAttention, Twins, Variant, init_weights

# isort: split
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
# For images of 64 x 64: maps of 16, 8 and 4 tokens a side, so that a window of stage 3 is its map.
SMALL = Variant((32, 64, 128), (1, 2, 4), (4, 4, 4), (2, 2, 2), sr_ratios=(4, 2, 1), window=4)
FIRST_MAP = 16


@dataclass(frozen=True)
class Design:
    """pattern: see PatternedTwins. peg: position encoding generators. table: learned absolute positions."""

    title: str
    pattern: tuple[str, ...]
    peg: bool = True
    table: bool = False


DESIGNS = {
    "g_peg": Design("G-PEG", ("G", "G", "G")),
    "g_absolute": Design("G-absolute", ("G", "G", "G"), peg=False, table=True),
    "g_none": Design("G-none", ("G", "G", "G"), peg=False),
    "g_absolute_peg": Design("G-absolute + PEG", ("G", "G", "G"), table=True),
    "ll_ll_gg": Design("LL/LL/GG", ("L", "L", "G")),
    "lg_lg_gg": Design("LG/LG/GG", ("LG", "LG", "G")),
}
PREFIX = "ablation_"  # of the models' names


class PositionTable(nn.Module):
    """Add a learned vector to each token (PVT), interpolated for a map of another size. (B, H, W, C) -> same."""

    def __init__(self, dim: int, side: int):
        super().__init__()
        self.table = nn.Parameter(nn.init.normal_(torch.empty(1, side, side, dim), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        table = self.table
        if table.shape[1:3] != x.shape[1:3]:
            table = F.interpolate(table.permute(0, 3, 1, 2), x.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)
        return x + table


class PatternedTwins(Twins):
    """A Twins whose blocks have LSA (L) or GSA (G) by a pattern for each stage, repeated over its blocks.

    peg=False: no position encoding generators. table: the side of the first stage's map, for learned absolute
    positions in every stage; None for none. options: see Twins.
    """

    def __init__(
        self, variant: Variant, *, pattern: tuple[str, ...], peg: bool = True, table: int | None = None, **options
    ):
        super().__init__(variant, **options)
        rates = dict(attn_drop=options.get("attn_drop_rate", 0.0), proj_drop=options.get("drop_rate", 0.0))
        for stage, blocks in enumerate(self.blocks):
            dim, heads = variant.dims[stage], variant.heads[stage]
            for index, block in enumerate(blocks):
                if pattern[stage][index % len(pattern[stage])] == "L":
                    pad = options.get("pad", "mask")
                    block.attn = LocalAttention(dim, heads, window=variant.window, pad=pad, **rates)
                else:
                    block.attn = GlobalAttention(dim, heads, sr_ratio=variant.sr_ratios[stage], **rates)
        if not peg:
            self.pos_block = nn.ModuleList(nn.Identity() for _ in variant.dims)
        if table is not None:
            tables = (PositionTable(dim, table // 2**stage) for stage, dim in enumerate(variant.dims))
            self.pos_drops = nn.ModuleList(map(nn.Sequential, tables, self.pos_drops))
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        tables = {name for name, _ in self.named_parameters() if name.endswith(".table")}
        return super().no_weight_decay() | tables


def _register(name: str, design: Design) -> None:
    def entry(
        pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options
    ) -> PatternedTwins:
        if pretrained:
            raise RuntimeError(f"{PREFIX}{name} has no weights")
        table = FIRST_MAP if design.table else None
        return PatternedTwins(SMALL, pattern=design.pattern, peg=design.peg, table=table, **options)

    entry.__name__ = entry.__qualname__ = f"{PREFIX}{name}"
    entry.__doc__ = f"{design.title}. Options are those of Twins."
    globals()[entry.__name__] = register_model(entry)


for _name, _design in DESIGNS.items():
    _register(_name, _design)


if __name__ == "__main__":
    sys.argv[0] = str(ROOT / "main.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
