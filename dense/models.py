"""Parts of configs: models of a Twins variant, learning rate schedules, data loaders and pipelines."""

from gvt import VARIANTS


def backbone(variant: str, **options) -> dict:
    """Return a backbone with its classification weights. options: those of TwinsBackbone that differ."""
    return dict(variant=variant, pretrained=f"pretrained/{variant}.pth") | options


def upernet(variant: str, *, num_classes: int = 150, **options) -> dict:
    dims = list(VARIANTS[variant].dims)
    return dict(
        backbone=backbone(variant, **options),
        decode_head=dict(in_channels=dims, num_classes=num_classes),
        auxiliary_head=dict(in_channels=dims[2], num_classes=num_classes),
    )


def with_fpn(variant: str, **options) -> dict:
    """Return what Semantic FPN, RetinaNet and Mask R-CNN share: only the neck sees the backbone's maps."""
    return dict(backbone=backbone(variant, **options), neck=dict(in_channels=list(VARIANTS[variant].dims)))


# ---------------------------------------------------------------- learning rates


def step_schedule(*, epochs: int, milestones: list[int], warmup: int = 500) -> list[dict]:
    """Return a detector's: linear warm-up from 1/1000 in `warmup` iterations, then a tenth at each milestone (epochs).

    mmengine's schedules take end - begin - 1 steps, hence the end of the first.
    """
    return [
        dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=warmup + 1),
        dict(type="MultiStepLR", gamma=0.1, by_epoch=True, begin=0, end=epochs, milestones=milestones),
    ]


def poly_schedule(
    *, iterations: int, power: float = 1.0, eta_min: float = 0.0, warmup: int = 0, start_factor: float = 1e-6
) -> list[dict]:
    """Return a segmentor's: (1 - i / iterations)^power down to eta_min, times a linear warm-up. Ends as above."""
    line = [dict(type="LinearLR", start_factor=start_factor, by_epoch=False, begin=0, end=warmup + 1)] if warmup else []
    return [*line, dict(type="PolyLR", power=power, eta_min=eta_min, by_epoch=False, begin=0, end=iterations + 1)]


# ---------------------------------------------------------------- segmentation data


def train_loader(batch_size: int, workers: int, **dataset) -> dict:
    """Return batches in one random order after another, without an end."""
    sampler = dict(type="InfiniteSampler", shuffle=True)
    return dict(batch_size=batch_size, num_workers=workers, persistent_workers=True, sampler=sampler, dataset=dataset)


def eval_loader(workers: int, **dataset) -> dict:
    """Return one image at a time, in order."""
    sampler = dict(type="DefaultSampler", shuffle=False)
    return dict(batch_size=1, num_workers=workers, persistent_workers=True, sampler=sampler, dataset=dataset)


def crop_pipeline(scale: tuple[int, int], *, ratio_range: tuple[float, float], crop_size: int) -> list[dict]:
    """For training: squares of crop_size pixels, from images resized to fit `scale` times a random ratio."""
    return [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        dict(type="RandomResize", scale=scale, ratio_range=ratio_range, keep_ratio=True, resize_type="TwinsResize"),
        dict(type="RandomCrop", crop_size=(crop_size, crop_size), cat_max_ratio=0.75),
        dict(type="TwinsRandomFlip", prob=0.5),
        dict(type="PhotoMetricDistortion"),
        dict(type="PackSegInputs"),
    ]


def eval_pipeline(scale: tuple[int, int]) -> list[dict]:
    """For scores: whole images, resized to fit `scale`."""
    return [
        dict(type="LoadImageFromFile"),
        dict(type="TwinsResize", scale=scale, keep_ratio=True),
        dict(type="LoadAnnotations"),  # after the resize: labels keep the image's own size
        dict(type="PackSegInputs"),
    ]


# ---------------------------------------------------------------- detection data


def single_scale_pipeline(scale: tuple[int, int], *, with_mask: bool = False, flip: float = 0.5) -> list[dict]:
    """For training: whole images, resized to fit `scale` (longer and shorter side), flipped with probability `flip`."""
    return [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=with_mask),
        dict(type="TwinsResize", scale=scale, keep_ratio=True),
        dict(type="TwinsRandomFlip", prob=flip),
        dict(type="PackDetInputs"),
    ]


def detection_eval_pipeline(scale: tuple[int, int], *, with_mask: bool = False, meta_keys: tuple = ()) -> list[dict]:
    """For scores: whole images, resized to fit `scale`. meta_keys: what a metric needs beside the usual."""
    usual = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    return [
        dict(type="LoadImageFromFile"),
        dict(type="TwinsResize", scale=scale, keep_ratio=True),
        # after the resize: boxes are for the image's own size
        dict(type="LoadAnnotations", with_bbox=True, with_mask=with_mask),
        dict(type="PackDetInputs", meta_keys=(*usual, *meta_keys)),
    ]


def multiscale_pipeline(*, with_mask: bool) -> list[dict]:
    """For 36 epochs: a shorter side of 480 to 800, half of the time after a crop of 384 to 600 from a smaller image."""

    def resize(*sides: int) -> dict:
        scales = [(side, 1333) for side in sides]
        return dict(type="RandomChoiceResize", scales=scales, keep_ratio=True, resize_type="TwinsResize")

    last = resize(*range(480, 801, 32))
    crop = dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True)
    return [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=with_mask),
        dict(type="TwinsRandomFlip", prob=0.5),
        dict(type="RandomChoice", transforms=[[last], [resize(400, 500, 600), crop, last]]),
        dict(type="PackDetInputs"),
    ]
