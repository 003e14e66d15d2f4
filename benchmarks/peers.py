"""FlashInfer and vLLM's Triton kernel over our pools, where they can be imported; never a dependency.

Written against flashinfer-python 0.6.12 and vllm 0.24.0. Both get the pool as they keep it themselves, one layer
contiguous, with our block tables; what a step plans once is planned before the clock starts, as for ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.oracles import K_SCALE, PagedCase
from benchmarks.timing import streamed
from benchmarks.work import Peer

WORKSPACE_BYTES = 256 << 20
SEGMENTS = 16
"""vLLM 0.24 cuts a context into so many parts."""

LEAST_PROGRAMS = 128
"""It does so where fewer programs than this would start."""


@cache
def flashinfer() -> Any | None:
    return _module("flashinfer")


@cache
def vllm_attention() -> Any | None:
    """The module of vLLM's Triton attention. Its compiled parts are not used: an installation without them does."""
    if _found("vllm"):
        for name in ("vllm._C_stable_libtorch", "vllm._C"):
            if name not in sys.modules and not _found(name):
                sys.modules[name] = types.ModuleType(name)
    return _module("vllm.v1.attention.ops.triton_unified_attention")


def _module(name: str) -> Any | None:
    if not _found(name.partition(".")[0]):
        return None
    try:
        return importlib.import_module(name)
    except Exception as error:
        print(f"{name} cannot be imported: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def attention(case: PagedCase, names: set[str]) -> dict[str, Callable[[], Peer]]:
    """Those of `names` that exist here and compute this case, by name."""
    spec = case.spec
    found: dict[str, Callable[[], Peer]] = {}
    if spec.alibi or spec.deterministic:
        return found
    alike = len({*spec.rows}) == 1 and not spec.prefix and not spec.float8 and spec.window is None
    if "sdpa" in names and alike:
        found["SDPA, contiguous"] = partial(sdpa_attention, case)
    if case.device.type == "cpu":
        return found
    if "flashinfer" in names and flashinfer() is not None and not (spec.float8 and spec.num_prompts):
        found["FlashInfer"] = partial(flashinfer_cascade if spec.prefix else flashinfer_attention, case)
    if "vllm" in names and vllm_attention() is not None:
        found["vLLM Triton"] = partial(vllm_unified, case)
    return found


def sdpa_attention(case: PagedCase) -> Peer:
    """torch, over keys and values that lie side by side: what no paged cache gives. The rows are all alike."""
    spec = case.spec
    batch, (length, new) = len(spec.rows), spec.rows[0]
    blocks = case.clean_tables()[:, : -(-length // spec.block_size)].long()
    mask: Any = None
    if 1 < new < length:
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(new, length)
    calls = []
    for q, layer in zip(case.queries, case.layers, strict=True):
        kv = layer[blocks].transpose(1, 2).flatten(2, 3)[:, :, :length]  # [B, 2, m, Hkv, D]
        k, v = (kv[:, half].contiguous().transpose(1, 2) for half in (0, 1))
        del kv
        heads = q.view(batch, new, *q.shape[1:]).transpose(1, 2)
        grouped = q.shape[1] != k.shape[1]
        calls.append(
            partial(
                F.scaled_dot_product_attention, heads, k, v, attn_mask=mask, is_causal=new == length and new > 1,
                scale=case.scale, enable_gqa=grouped,
            )
        )  # fmt: skip
    return Peer(calls, lambda: case.error(calls[0]().transpose(1, 2).flatten(0, 1)))


def _pages(
    case: PagedCase, rows: slice | None = None, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's tables, on the host, from each row's page `first` on: where its pages begin among all, the pages,
    tokens in its last page."""
    size = case.spec.block_size
    tables = case.clean_tables().cpu().numpy()[rows or slice(None)]
    lengths = case.lengths[rows or slice(None)]
    counts = -(-lengths // size)
    pages = np.concatenate([row[first:count] for row, count in zip(tables, counts, strict=True)])
    begins = np.concatenate([[0], np.cumsum(counts - first)])
    return tuple(torch.from_numpy(x.astype(np.int32)) for x in (begins, pages, (lengths - 1) % size + 1))  # type: ignore[return-value]


def _native(case: PagedCase) -> list[torch.Tensor]:
    """[N, 2, block, Hkv, D] each, contiguous."""
    return [layer.contiguous() for layer in case.layers]


def flashinfer_attention(case: PagedCase) -> Peer:
    spec, module = case.spec, flashinfer()
    assert module is not None
    heads, kv_heads = spec.heads
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=case.device)
    begins, pages, last = _pages(case)
    kv_dtype = torch.float8_e4m3fn if spec.float8 else spec.dtype
    window = -1 if spec.window is None else spec.window - 1
    common: dict[str, Any] = {
        "window_left": window, "q_data_type": spec.dtype, "kv_data_type": kv_dtype, "sm_scale": case.scale,
    }  # fmt: skip
    if spec.num_prompts:
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            torch.from_numpy(case.starts), begins, pages.to(case.device), last, heads, kv_heads, spec.size,
            spec.block_size, causal=True, **common,
        )  # fmt: skip
    else:
        grouped = heads // kv_heads >= 4
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=grouped)
        wrapper.plan(begins, pages.to(case.device), last, heads, kv_heads, spec.size, spec.block_size, **common)
    scales = {"k_scale": K_SCALE} if spec.float8 else {}
    calls = [partial(wrapper.run, q, kv, **scales) for q, kv in zip(case.queries, _native(case), strict=True)]
    return Peer(calls, lambda: case.error(calls[0]()))


def flashinfer_cascade(case: PagedCase) -> Peer:
    """Two levels: all rows' queries against the common pages, then each row's against its own."""
    spec, module = case.spec, flashinfer()
    assert module is not None and not spec.num_prompts
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=case.device)
    shared, batch = spec.prefix // spec.block_size, len(spec.rows)
    begins, pages, last = (x.to(case.device) for x in _pages(case, first=shared))
    _, common, _ = (x.to(case.device) for x in _pages(case, slice(0, 1)))
    whole = torch.tensor([0, batch], dtype=torch.int32, device=case.device)
    each = torch.arange(batch + 1, dtype=torch.int32, device=case.device)
    wrapper = module.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    wrapper.plan(
        [whole, each],
        [torch.tensor([0, shared], dtype=torch.int32, device=case.device), begins],
        [common[:shared], pages],
        [torch.tensor([spec.block_size], dtype=torch.int32, device=case.device), last],
        *spec.heads, spec.size, spec.block_size, sm_scale=case.scale, q_data_type=spec.dtype,
    )  # fmt: skip
    calls = [partial(wrapper.run, q, kv) for q, kv in zip(case.queries, _native(case), strict=True)]
    return Peer(calls, lambda: case.error(calls[0]()))


def vllm_unified(case: PagedCase) -> Peer:
    """With the split contexts that vLLM's own backend prepares for small batches."""
    module = vllm_attention()
    assert module is not None
    calls = vllm_calls(case, module)
    return Peer(calls, lambda: case.error(calls[0]()))


def vllm_calls(case: PagedCase, module: Any) -> list[Callable[[], torch.Tensor]]:
    spec = case.spec
    heads, kv_heads = spec.heads
    device, batch, threshold = case.device, len(spec.rows), LEAST_PROGRAMS // kv_heads
    padded = 1 << (spec.size - 1).bit_length()
    parts = (threshold, heads, SEGMENTS)
    one = torch.ones(1, device=device)
    mode = module.KVQuantMode.FP8_PER_TENSOR if spec.float8 else module.KVQuantMode.NONE
    arguments: dict[str, Any] = {
        "cu_seqlens_q": torch.from_numpy(case.starts).to(device),
        "max_seqlen_q": max(new for _, new in spec.rows),
        "seqused_k": torch.from_numpy(case.lengths).to(device),
        "max_seqlen_k": int(case.lengths.max()),
        "softmax_scale": case.scale,
        "causal": True,
        "window_size": (-1, -1) if spec.window is None else (spec.window - 1, 0),
        "block_table": case.clean_tables(),
        "softcap": 0,
        "q_descale": None,
        "k_descale": (one * K_SCALE if spec.float8 else one).expand(batch, kv_heads),
        "v_descale": one.expand(batch, kv_heads),
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": SEGMENTS,
        "softmax_segm_output": torch.empty(*parts, padded, device=device),
        "softmax_segm_max": torch.empty(parts, device=device),
        "softmax_segm_expsum": torch.empty(parts, device=device),
        "kv_quant_mode": mode,
    }

    def call(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        module.unified_attention(q=q, k=kv[:, 0], v=kv[:, 1], out=out, **arguments)
        return out

    return [partial(call, q, kv) for q, kv in zip(case.queries, _native(case), strict=True)]


def flashinfer_sampling(
    logits: list[torch.Tensor],  # [S, V] float32 each
    top_k: int,
    top_p: float,
) -> dict[str, Callable[[], Peer]]:
    """Its samples are others than ours: timed only."""
    module = flashinfer()
    if module is None or not logits[0].is_cuda:
        return {}

    def build() -> Peer:
        k = torch.full((len(logits[0]),), top_k, dtype=torch.int32, device=logits[0].device)
        p = torch.full((len(logits[0]),), top_p, device=logits[0].device)
        run = module.sampling.top_k_top_p_sampling_from_logits
        return Peer([partial(run, x, k, p) for x in logits], how=streamed)

    return {"FlashInfer": build}
