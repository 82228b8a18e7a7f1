"""What a dense run changes for the machine that it runs on."""

import pytest
import torch

pytest.importorskip("mmengine")
pytest.importorskip("mmcv")

from mmengine.config import Config

from dense.runner import adapt_to_machine


@pytest.mark.parametrize("gpu", [True, False])
def test_cudnn_attention_is_off_on_a_gpu_only(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        lines = adapt_to_machine(Config(dict(env_cfg=dict())))
        assert torch.backends.cuda.cudnn_sdp_enabled() != gpu
        assert any("cuDNN" in line for line in lines) == gpu
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
