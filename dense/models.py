"""What a segmentor or a detector must know about a Twins variant: its name, its weights and its widths. For the configs."""

from gvt import VARIANTS


def backbone(variant: str, **options) -> dict:
    """The variant with its published weights. options: those of dense.backbone.TwinsBackbone that differ from the setting's."""
    return dict(variant=variant, pretrained=f"pretrained/{variant}.pth", **options)


def upernet(variant: str, **options) -> dict:
    dims = list(VARIANTS[variant].dims)
    return dict(backbone=backbone(variant, **options), decode_head=dict(in_channels=dims), auxiliary_head=dict(in_channels=dims[2]))


def with_fpn(variant: str, **options) -> dict:
    """Semantic FPN, RetinaNet and Mask R-CNN: only the neck sees the backbone's maps."""
    return dict(backbone=backbone(variant, **options), neck=dict(in_channels=list(VARIANTS[variant].dims)))


def steps(*, epochs: int, down_at: list[int], warmup: int = 500) -> list[dict]:
    """The detectors' learning rates: from a thousandth in `warmup` iterations, then a tenth less at each epoch of `down_at`.

    A schedule of mmengine takes end - begin - 1 steps, hence the end of the first.
    """
    return [
        dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=warmup + 1),
        dict(type="MultiStepLR", gamma=0.1, by_epoch=True, begin=0, end=epochs, milestones=down_at),
    ]


def many_sizes(*, with_mask: bool) -> list[dict]:
    """The 36-epoch training pipeline: a short side of 480 to 800, half of the time after a crop of 384 to 600 from a smaller picture."""
    resized = dict(type="RandomChoiceResize", scales=[(short, 1333) for short in range(480, 801, 32)], keep_ratio=True)
    smaller = dict(type="RandomChoiceResize", scales=[(short, 1333) for short in (400, 500, 600)], keep_ratio=True)
    cropped = dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True)
    return [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=with_mask),
        dict(type="RandomFlip", prob=0.5),
        dict(type="RandomChoice", transforms=[[resized], [smaller, cropped, resized]]),
        dict(type="PackDetInputs"),
    ]
