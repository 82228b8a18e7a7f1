"""What the tests of options share: a small run inside this process, and its weights."""

import os
import signal

import gvt  # noqa: F401  registers the models

# isort: split
import torch
from conftest import SMALL_RUN

import main
from training import checkpoint, options


def parse(*words):
    return options.parse_args([str(word) for word in words])


def here(*words, **hooks):
    return main.run(parse(*words), **hooks)


def small(toy, folder, *words):
    return [*SMALL_RUN, "--data-path", toy, "--warmup-epochs", 0, "--lr", "1e-2", "--output_dir", folder, *words]


def weights(folder):
    return checkpoint.load(str(folder / "checkpoint.pth"))["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(epoch: int, step: int):
    """A hook for `here`: ask the run to stop at a batch of an epoch."""

    def poll(where, state, *batch):
        if where == "train" and state.epoch + 1 == epoch and batch == (step,):
            os.kill(os.getpid(), signal.SIGTERM)

    return poll
