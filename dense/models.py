"""What a segmentor or a detector must know about a Twins variant: its name, its weights and its widths. For the
configs.
"""

from gvt import VARIANTS


def backbone(variant: str, **options) -> dict:
    """The variant with its published weights. options: those of dense.backbone.TwinsBackbone that differ from the
    setting's.
    """
    return dict(variant=variant, pretrained=f"pretrained/{variant}.pth") | options


def upernet(variant: str, *, num_classes: int = 150, **options) -> dict:
    dims = list(VARIANTS[variant].dims)
    decode = dict(in_channels=dims, num_classes=num_classes)
    return dict(
        backbone=backbone(variant, **options),
        decode_head=decode,
        auxiliary_head=dict(in_channels=dims[2], num_classes=num_classes),
    )


def with_fpn(variant: str, **options) -> dict:
    """Semantic FPN, RetinaNet and Mask R-CNN: only the neck sees the backbone's maps."""
    return dict(backbone=backbone(variant, **options), neck=dict(in_channels=list(VARIANTS[variant].dims)))


def steps(*, epochs: int, down_at: list[int], warmup: int = 500) -> list[dict]:
    """The detectors' learning rates: from a thousandth in `warmup` iterations, then a tenth less at each epoch of
    `down_at`.

    A schedule of mmengine takes end - begin - 1 steps, hence the end of the first.
    """
    return [
        dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=warmup + 1),
        dict(type="MultiStepLR", gamma=0.1, by_epoch=True, begin=0, end=epochs, milestones=down_at),
    ]


def poly(
    *, iterations: int, power: float = 1.0, eta_min: float = 0.0, warmup: int = 0, start_factor: float = 1e-6
) -> list[dict]:
    """A segmentor's learning rates: (1 - i / iterations)^power from the rate to eta_min, times a straight line up in
    `warmup` iterations.

    Ends as in `steps`.
    """
    line = [dict(type="LinearLR", start_factor=start_factor, by_epoch=False, begin=0, end=warmup + 1)] if warmup else []
    return [*line, dict(type="PolyLR", power=power, eta_min=eta_min, by_epoch=False, begin=0, end=iterations + 1)]


def endless(batch_size: int, workers: int, **dataset) -> dict:
    """A segmentor's training data, in one order after another."""
    sampler = dict(type="InfiniteSampler", shuffle=True)
    return dict(batch_size=batch_size, num_workers=workers, persistent_workers=True, sampler=sampler, dataset=dataset)


def one_by_one(workers: int, **dataset) -> dict:
    """A segmentor's data for scores."""
    sampler = dict(type="DefaultSampler", shuffle=False)
    return dict(batch_size=1, num_workers=workers, persistent_workers=True, sampler=sampler, dataset=dataset)


def crops(scale: tuple[int, int], *, ratio_range: tuple[float, float], side: int) -> list[dict]:
    """A segmentor's training pipeline: squares of `side` pixels from pictures within `scale` times a ratio."""
    return [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        dict(type="RandomResize", scale=scale, ratio_range=ratio_range, keep_ratio=True),
        dict(type="RandomCrop", crop_size=(side, side), cat_max_ratio=0.75),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PhotoMetricDistortion"),
        dict(type="PackSegInputs"),
    ]


def whole(scale: tuple[int, int]) -> list[dict]:
    """A segmentor's pipeline for scores: pictures within `scale`."""
    return [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=scale, keep_ratio=True),
        dict(type="LoadAnnotations"),  # after Resize: the labels keep the picture's own size
        dict(type="PackSegInputs"),
    ]


def one_size(scale: tuple[int, int], *, with_mask: bool = False, flip: float = 0.5) -> list[dict]:
    """A detector's training pipeline: whole pictures within `scale`, the longer and the shorter side at most, mirrored
    in a share of `flip`.
    """
    return [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=with_mask),
        dict(type="Resize", scale=scale, keep_ratio=True),
        dict(type="RandomFlip", prob=flip),
        dict(type="PackDetInputs"),
    ]


def for_scores(scale: tuple[int, int], *, with_mask: bool = False, more: tuple[str, ...] = ()) -> list[dict]:
    """A detector's pipeline for tests: whole pictures within `scale`, as in one_size. more: what a metric wants to know
    beside the usual.
    """
    return [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=scale, keep_ratio=True),
        dict(
            type="LoadAnnotations", with_bbox=True, with_mask=with_mask
        ),  # after Resize: boxes are for the picture's own size
        dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", *more)),
    ]


def many_sizes(*, with_mask: bool) -> list[dict]:
    """The 36-epoch training pipeline: a short side of 480 to 800, half of the time after a crop of 384 to 600 from a
    smaller picture.
    """
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
