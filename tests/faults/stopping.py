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


def stop(phase, state, batch=0) -> None:
    """The accident, once, where the run first looks for signals after the given place."""
    if kind == "update" and phase == "train":
        reached = [state.epoch + 1, batch // state.args.grad_accum_steps] >= numbers
    else:
        reached = kind in ("update", "evaluation") and phase == "eval" and state.epoch == numbers[0]
    if reached and not stopped:
        stopped.append(place)
        accident()


stopped = []
if kind == "save":
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
    utils.leave(main.run(options.parse_args(options_given), stop))
