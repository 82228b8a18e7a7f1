"""The loss that each setting trains with."""

import torch
import torch.nn.functional as F

from losses import build_criterion


def test_soft_targets_under_mixing():
    logits, targets = torch.randn(4, 5), torch.softmax(torch.randn(4, 5), 1)
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    for smoothing in (0.0, 0.1):  # the targets are smoothed already
        assert torch.allclose(build_criterion(mixing=True, smoothing=smoothing)(logits, targets), expected)


def test_labels_otherwise():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        assert torch.allclose(build_criterion(mixing=False, smoothing=smoothing)(logits, labels), expected)
