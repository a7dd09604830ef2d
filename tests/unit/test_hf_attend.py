"""The Attend over a Transformers cache equals the packed one: padded, cached, packed into rows, with any mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

from hanlin.errors import RequestError  # noqa: E402 - after the check above
from hanlin.hf.attend import CacheAttend  # noqa: E402
from hanlin.layers.attend import PackedAttend  # noqa: E402

H, G, K = 4, 2, 8


def tensors(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(tokens, heads, K, generator=generator) for heads in (H, G, G))
    return q, k, v


def expected(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    return PackedAttend(lengths)(0, q, k, v)


either = pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])


@either
def test_rows_without_a_cache(eager: bool) -> None:
    q, k, v = tensors(14)
    got = CacheAttend(rows=2, eager=eager)(0, q, k, v)
    torch.testing.assert_close(got, expected(q, k, v, [7, 7]), rtol=1e-5, atol=1e-6)


@either
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("steps", [[7], [3, 4], [4, 1, 1, 1], [1] * 7])
def test_chunks_with_a_cache(eager: bool, static: bool, steps: list[int]) -> None:
    q, k, v = tensors(7)
    config = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=H * K, num_attention_heads=H)
    cache = transformers.StaticCache(config=config, max_cache_len=12) if static else transformers.DynamicCache()
    outs, past = [], 0
    for step in steps:
        new = slice(past, past + step)
        outs.append(CacheAttend(rows=1, cache=cache, past=past, eager=eager)(0, q[new], k[new], v[new]))
        past += step
    torch.testing.assert_close(torch.cat(outs), expected(q, k, v, [7]), rtol=1e-5, atol=1e-6)


@either
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_padding(eager: bool, left: bool, dtype: torch.dtype) -> None:
    q, k, v = tensors(10)
    mask = torch.ones(2, 5, dtype=dtype)
    mask[1, slice(0, 2) if left else slice(3, 5)] = 0
    got = CacheAttend(rows=2, mask=mask, eager=eager)(0, q, k, v)
    assert got.isfinite().all()
    rows = slice(7, 10) if left else slice(5, 8)
    torch.testing.assert_close(got[:5], expected(q[:5], k[:5], v[:5], [5]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[rows], expected(q[rows], k[rows], v[rows], [3]), rtol=1e-5, atol=1e-6)


@either
def test_a_padded_row_goes_on(eager: bool) -> None:
    q, k, v = tensors(12)
    rows = [slice(0, 6), slice(6, 12)]
    cache = transformers.DynamicCache()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    first = torch.cat([torch.arange(0, 4), torch.arange(6, 10)])
    second = torch.tensor([4, 5, 10, 11])
    attend = CacheAttend(rows=2, cache=cache, mask=mask[:, :4], eager=eager)
    got = torch.zeros_like(q)
    got[first] = attend(0, q[first], k[first], v[first])
    attend = CacheAttend(rows=2, cache=cache, past=4, mask=mask, eager=eager)
    got[second] = attend(0, q[second], k[second], v[second])
    torch.testing.assert_close(got[rows[0]], expected(q[:6], k[:6], v[:6], [6]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[8:], expected(q[8:], k[8:], v[8:], [4]), rtol=1e-5, atol=1e-6)


@either
def test_sequences_packed_into_a_row(eager: bool) -> None:
    q, k, v = tensors(9)
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2]])
    got = CacheAttend(rows=1, segments=segments, eager=eager)(0, q, k, v)
    torch.testing.assert_close(got, expected(q, k, v, [4, 2, 3]), rtol=1e-5, atol=1e-6)


@either
@pytest.mark.parametrize("kind", ["bool", "additive", "whole"])
def test_finished_masks(eager: bool, kind: str) -> None:
    q, k, v = tensors(6)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    mask = {"bool": seen, "whole": seen.long(), "additive": torch.where(seen, 0.0, torch.finfo(torch.float32).min)}
    got = CacheAttend(rows=1, mask=mask[kind], eager=eager)(0, q, k, v)
    torch.testing.assert_close(got, expected(q, k, v, [6]), rtol=1e-5, atol=1e-6)
    half = CacheAttend(rows=1, mask=mask[kind], eager=eager)(0, q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), got, rtol=0.05, atol=0.05)


def test_probabilities() -> None:
    q, k, v = tensors(10)
    attend = CacheAttend(rows=2, eager=True, mask=torch.tensor([[1] * 5, [0] + [1] * 4]))
    attend(3, q, k, v)
    weights = attend.probabilities[3]
    assert weights.shape == (2, H, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, H, 5))
    assert not weights[1, :, 1:, 0].any()
    assert not weights.triu(1).any()


def test_gradients() -> None:
    found = []
    for attend in (CacheAttend(rows=2), CacheAttend(rows=2, eager=True), PackedAttend([5, 5])):
        q, k, v = (x.requires_grad_() for x in tensors(10))
        attend(0, q, k, v).square().sum().backward()
        found.append((q.grad, k.grad, v.grad))
    for grads in found[:2]:
        for a, b in zip(grads, found[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_mask_of_the_wrong_length_is_named() -> None:
    q, k, v = tensors(4)
    cache = transformers.DynamicCache()
    CacheAttend(rows=1, cache=cache)(0, q, k, v)
    with pytest.raises(RequestError, match=r"\(1, 4\).*need \(1, 8\)"):
        CacheAttend(rows=1, cache=cache, past=4, mask=torch.tensor([[0, 1, 1, 1]]))(0, q, k, v)
