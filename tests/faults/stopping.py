"""main.py with an accident at a given place: python tests/faults/stopping.py WHERE[@RANK] main.py's options ...

WHERE is update:E:U (after update U of epoch E), evaluation:E (after its first batch), save:N (while save number N of
CHECKPOINT is being written), or none. HOW, in the environment variable ACCIDENT, is a signal's name (SIGTERM if not
given). RANK is the process that has it (0).
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
where, options_given = sys.argv[1], sys.argv[2:]
sys.argv[0:2] = ["main.py"]  # as the record of the command has it

from training import launcher

if launcher.launched():
    launcher.end_with_launcher()

import main
import utils
from training import checkpoint, options

place, _, rank = where.partition("@")
kind, *numbers = place.split(":")
numbers = [int(number) for number in numbers]


def accident() -> None:
    if utils.get_rank() == int(rank or 0):
        os.kill(os.getpid(), signal.Signals[os.environ.get("ACCIDENT", "SIGTERM")])


if kind == "update":
    after_update = main.Run.after_update

    def stop_after(self, updates, reached, stopping):
        after_update(self, updates, reached, stopping)
        if [self.epoch + 1, updates] == numbers:
            accident()

    main.Run.after_update = stop_after
elif kind == "evaluation":
    between, batches = main.Run.between_batches, []

    def stop_between(self):
        if self.epoch == numbers[0]:
            batches.append(1)
            if len(batches) == 1:
                accident()
        between(self)

    main.Run.between_batches = stop_between
elif kind == "save":
    write, saves = checkpoint.torch.save, []

    def stop_inside(payload, file):
        saves.append(1)
        if len(saves) == numbers[0]:
            file.write(b"PK\x03\x04 half a checkpoint")
            file.flush()
            accident()
        write(payload, file)

    checkpoint.torch.save = stop_inside

if __name__ == "__main__":
    utils.leave(main.run(*options.parse_args(options_given)))
