"""A run's folder: what became of the run."""

import contextlib
import datetime
import json
from pathlib import Path

from training.files import STATUS, this_process, write_text


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Status:
    """status.json: {"state": running | finished | preempted | failed, "reason", "epoch", "updates", "by", "started",
    "time"}.

    A failure is written by the process that had it; those that only notice that another one is gone leave its reason as
    it is.
    """

    def __init__(self, folder: Path, started: str):
        self.path, self.started, self.place = Path(folder) / STATUS, started, {"epoch": -1, "updates": 0}

    def write(self, state: str, reason: str = "") -> None:
        record = {
            "state": state,
            "reason": reason,
            **self.place,
            "by": this_process(),
            "started": self.started,
            "time": now(),
        }
        with contextlib.suppress(OSError):  # a full disk has an error of its own, which comes first
            write_text(self.path, json.dumps(record, indent=1) + "\n")

    def fail(self, reason: str, *, echo: bool = False) -> None:
        if not (echo and self.told()):
            self.write("failed", reason)

    def told(self) -> bool:
        """Whether this run's failure has been written already."""
        try:
            record = json.loads(self.path.read_text())
            return record["state"] == "failed" and record["started"] == self.started
        except (OSError, ValueError, KeyError, TypeError):
            return False
