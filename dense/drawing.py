"""Draw the results of a test: each image as the model read it, in a file of its own name."""

from pathlib import Path

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner

from dense.transforms import image_loaders
from training.images import ImageReader


class DrawResults(Hook):
    """Write folder/NAME.png for each image. options: of the library's visualizer, as pred_score_thr."""

    def __init__(self, folder: Path, **options):
        self.folder, self.options = folder, options

    def before_test(self, runner: Runner) -> None:
        kwargs = {}
        for step in image_loaders(runner.test_dataloader.dataset)[:1]:
            kwargs = dict(alpha=step.reader.alpha, exif=step.reader.exif, max_pixels=step.reader.max_pixels)
        self.read = ImageReader(**kwargs)  # of its own: the data set's counts what it reads

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: list = ()) -> None:
        for sample in outputs:
            path = self.folder / Path(sample.img_path).with_suffix(".png").name
            image = np.asarray(self.read(sample.img_path))
            options = dict(data_sample=sample, out_file=str(path), **self.options)
            runner.visualizer.add_datasample(path.stem, image, **options)
