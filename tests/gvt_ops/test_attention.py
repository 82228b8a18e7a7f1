"""Attention in half precision on a CPU, of an accelerated model: as near to the exact result as PyTorch's own."""

import copy
import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from exact import doubled, needs_onednn, rms_error
from torch import nn

from gvt_ops import accelerate, onednn
from gvt_ops import attention as module
from gvt_ops.attention import attention, unsupported_reason


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    """One on which GEMMs are faster than fused attention."""
    monkeypatch.setattr(onednn, "WITH_AMX", False)


def queries_keys_values(batch, heads, queries, keys, dtype=torch.bfloat16):
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, count, heads, 32).to(dtype).transpose(1, 2) for count in (queries, keys, keys))
    return q, k, v, torch.rand(batch, 1, 1, keys) > 0.3


@needs_onednn
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"), [(512, 2, 49, 49), (1, 1, 3136, 49), (2, 3, 5, 256), (3, 1, 1, 1)]
)
def test_attention_in_bfloat16(batch, heads, queries, keys, masked):
    """As near to the exact one as torch's own products of this dtype; batches that go in parts lose nothing."""
    *given, mask = queries_keys_values(batch, heads, queries, keys)
    mask = mask | (torch.arange(keys) == 0) if masked else None  # each query has a key
    attend = functools.partial(attention, mask=mask, dropout=nn.Dropout(0.1).eval())
    with torch.no_grad():
        assert unsupported_reason(*given[:2]) is None
        result = attend(*given, fused=True, accelerated=True)
        exact = attend(*doubled(*given), fused=True)
        plain = attend(*given, fused=False)
    assert result.shape == plain.shape and result.dtype == torch.bfloat16
    assert rms_error(result, exact) <= 2 * rms_error(plain, exact)


@needs_onednn
def test_one_mask_for_all_rows(monkeypatch):
    q, k, v, mask = queries_keys_values(9, 2, 49, 49)
    attend = functools.partial(attention, q, k, v, mask[:1], dropout=nn.Dropout(0.0), fused=True, accelerated=True)
    with torch.no_grad():
        whole = attend()
        monkeypatch.setattr(module, "MAX_WEIGHTS", 4 * 2 * 49 * 49)
        assert module.max_batch(q, k, accelerated=True) == 4 and module.max_batch(q, k, accelerated=False) is None
        assert torch.equal(attend(), whole)


@needs_onednn
def test_fused_attention_on_a_processor_with_amx(monkeypatch):
    monkeypatch.setattr(onednn, "WITH_AMX", True)
    monkeypatch.setattr(module, "gemm_attention", lambda *_: pytest.fail("through GEMMs"))
    q, k, v, mask = queries_keys_values(2, 1, 49, 49)
    with torch.no_grad():
        assert "AMX" in unsupported_reason(q, k)
        found = attention(q, k, v, mask, dropout=nn.Dropout(0.0), fused=True, accelerated=True)
        assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@needs_onednn
def test_attention_that_is_unsupported_says_why():
    q, k, v, _ = queries_keys_values(1, 1, 2, 257)
    assert "257 keys" in unsupported_reason(q, k)
    assert "torch.float32" in unsupported_reason(q.float(), k.float())
    assert "gradients" in unsupported_reason(q.requires_grad_(), k[:, :, :9])
    torch.manual_seed(0)
    with torch.no_grad():  # dropout of weights, where nothing asks for gradients
        attend = functools.partial(attention, q, k[:, :, :9], v[:, :, :9], fused=True, accelerated=True)
        dropped, kept = attend(dropout=nn.Dropout(0.9)), attend(dropout=nn.Dropout(0.0))
    assert not torch.allclose(dropped, kept, atol=0.1)


@pytest.mark.parametrize("name", ["alt_gvt_demo", "pcpvt_small_v0"])
def test_half_precision_trains_as_torch_alone_does(name):
    """Attention goes through float32 on a CPU, where gradients are wanted: no farther from the exact gradients than in
    bfloat16.
    """
    torch.manual_seed(0)
    model = accelerate(timm.create_model(name, num_classes=5))
    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])

    def gradients(model, x, dtype):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            F.cross_entropy(model(x), labels).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact = gradients(accelerate(copy.deepcopy(model), enable=False).double(), x.double(), torch.float64)
    fused = gradients(model, x, torch.bfloat16)
    model.set_fused_attn(False)
    assert rms_error(fused, exact) <= 2 * rms_error(gradients(model, x, torch.bfloat16), exact)


def test_plain_attention_in_half_precision_stays_in_it(monkeypatch):
    """The way through float32 is the accelerated model's alone."""
    seen, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *rest, **named: seen.append(q.dtype) or sdpa(q, *rest, **named)
    )
    q = torch.randn(2, 1, 4, 32, dtype=torch.bfloat16, requires_grad=True)
    results = [
        attention(q, q, q, dropout=nn.Dropout(0.0), fused=True, accelerated=accelerated)
        for accelerated in (False, True)
    ]
    assert seen == [torch.bfloat16, torch.float32] and all(result.dtype == torch.bfloat16 for result in results)
