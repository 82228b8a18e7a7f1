"""mmsegmentation's data sets for the file names that people have: TwinsX is its X, for each X."""

import os
from collections import Counter
from functools import partial
from pathlib import Path

from mmengine.logging import print_log
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from dense.data_checks import FileNames, report, stems
from dense.transforms import CHECKED
from training.folders import log_unread


class AnyNames:
    """List images and labels with suffixes in any case and names in any Unicode normalization; skip what other programs
    leave beside images, and count by suffix what is not read.
    """

    def load_data_list(self) -> list[dict]:
        folder, suffix = self.data_prefix.get("img_path") or "", self.img_suffix
        if not os.path.isdir(folder):
            return super().load_data_list()
        if self.ann_file and os.path.isfile(self.ann_file):
            return self.named(super().load_data_list(), folder)
        found = self.found(folder)
        items = []
        for self.img_suffix in sorted({path[-len(suffix) :] for path in found}) or [suffix]:
            items += super().load_data_list()
        self.img_suffix = suffix
        items = [item for item in items if not found or os.path.normpath(item["img_path"]) in found]
        return self.named(sorted(items, key=lambda item: item["img_path"]), folder)

    def found(self, folder: str) -> set[str]:
        """Return the image files below the folder, and log how many files are not read."""
        files = stems(folder, self.img_suffix, unread := Counter())
        labels = os.path.normpath(self.data_prefix.get("seg_map_path") or folder)
        if Path(labels).is_relative_to(os.path.normpath(folder)):
            unread.pop(os.path.splitext(self.seg_map_suffix)[1].lower(), None)
        if not files:  # images that Pillow does not read
            unread.pop(os.path.splitext(self.img_suffix)[1].lower(), None)
        log_unread(unread, folder, write=partial(print_log, logger="current"))
        return {os.path.normpath(path) for path in files.values()}

    def named(self, items: list[dict], folder: str) -> list[dict]:
        """Return the items with the paths of the files that are there."""
        names = FileNames()
        for item in items:
            item |= {key: names.find(item[key]) for key in ("img_path", "seg_map_path") if key in item}
        report(names.findings(folder))
        return items


for name, dataset in list(DATASETS.module_dict.items()):
    if issubclass(dataset, BaseSegDataset):
        # Under its name in this module, where processes that load data look for it.
        globals()[f"Twins{name}"] = type(f"Twins{name}", (AnyNames, dataset), dict(__module__=__name__))
        DATASETS.register_module(module=globals()[f"Twins{name}"])
        CHECKED["mmseg"].add(name)
