"""Training images that cannot be read: replaced by others of their class, and listed in a file of the run's folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from training import files
from training.errors import UserError, short_reason
from utils import is_main_process, log


class BadImages:
    """Read images of a training set, another one of the same class where one cannot be read.

    Which one depends on (seed, epoch, index) alone, not on workers, processes or restarts. The file has a line for each
    bad image: path, tab, reason; it is shared by all processes and counts through restarts. most: with more bad images
    the run ends.
    """

    def __init__(self, labels: Sequence[int], *, seed: int, file: Path | None, most: int):
        self.labels, self.seed, self.file, self.most, self.reported = np.asarray(labels), seed, file, most, 0
        self.noted: set[int] = set()  # by this process

    def read(self, dataset: Dataset, epoch: int, index: int):
        """Return an item of `dataset`; raise UserError if no image of its class can be read, or too many cannot."""
        first = None
        for candidate in self.candidates(epoch, index):
            try:
                return dataset[candidate]
            except UserError as error:
                self.note(dataset.samples[candidate][0], candidate, error)
                first = first or error
        name = dataset.classes[self.labels[index]]
        advice = f"replace them, or remove the class [{short_reason(first, 120)}]"
        raise UserError(f"no image of a class can be read ({name}): {advice}") from None

    def candidates(self, epoch: int, index: int) -> Iterator[int]:
        """Yield the image, then the others of its class in a drawn order."""
        yield index
        members = np.flatnonzero(self.labels == self.labels[index])
        key = [part % 2**64 for part in (self.seed, epoch, index)]
        yield from np.random.default_rng(key).permutation(members[members != index]).tolist()

    def note(self, path: str, index: int, error: UserError) -> None:
        """List an image that is not listed yet; raise UserError if there are too many."""
        if index in self.noted or self.file is None:
            return
        reason = " ".join(str(error).replace(f" ({path})", "").split())
        try:
            number = files.add_line(self.file, path.replace("\n", "\\n"), reason)
        except OSError as problem:
            raise UserError(f"cannot write ({self.file}): {problem.strerror}; make room") from problem
        self.noted.add(index)
        if number > self.most:
            what = f"more than {self.most} training images cannot be read (--max-bad {self.most})"
            advice = f"repair those in {self.file} and delete it, or raise --max-bad, then --resume auto"
            raise UserError(f"{what}: {advice}")

    def report(self, *, final: bool) -> None:
        """Log how many are listed, once at the first and then after each epoch with more."""
        if self.file is None or not is_main_process() or not (final or self.reported == 0):
            return
        number = len(files.lines(self.file))
        if number > self.reported:
            log(f"bad images: {number} so far, replaced by others of their class; listed in {self.file}")
            self.reported = number
