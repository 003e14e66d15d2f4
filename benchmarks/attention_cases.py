"""Paged attention: what a step of decoding, of a prompt and of both together costs in one layer.

The pool is as large as the model's would be for these rows, all layers, so that blocks lie as far apart as they do in
a server.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from benchmarks import peers, shapes
from benchmarks.oracles import Paged, PagedCase, poisoned_allocations, worst
from benchmarks.timing import hosted, issued, num_sets
from benchmarks.work import Case, Peer, Setting, Target, Work
from quire.kernels.attention import PagedRows, paged_attention

K = 1024
OPT = shapes.sizes("opt-13b")
PEERS = {"sdpa", "flashinfer", "vllm"}

SPECS: dict[str, tuple[Paged, Target | None]] = {
    "decode 64x4k": (Paged(((4 * K, 1),) * 64), Target("share", 0.8)),
    "decode 16x2k": (Paged(((2 * K, 1),) * 16), Target("share", 0.7)),
    "decode 1x64k": (Paged(((64 * K, 1),)), Target("share", 0.7)),
    "decode 1x1k": (Paged(((K, 1),)), None),
    "decode 256x1k": (Paged(((K, 1),) * 256), None),
    "decode 1x64k + 15x4k": (Paged(((64 * K, 1),) + ((4 * K, 1),) * 15), None),
    "decode 37 odd lengths": (Paged(tuple((97 * i + 1, 1) for i in range(37))), None),
    "decode 64x8k window 4k": (Paged(((8 * K, 1),) * 64, window=4 * K), None),
    "decode 64x4k float8": (Paged(((4 * K, 1),) * 64, float8=True), None),
    "decode 16x2k deterministic": (Paged(((2 * K, 1),) * 16, deterministic=True), None),
    "decode 64x4k static": (Paged(((4 * K, 1),) * 64, static=True), Target("share", 0.8)),
    "decode 1x1k static": (Paged(((K, 1),), static=True), None),
    "decode 16x2k OPT-13B": (Paged(((2 * K, 1),) * 16, (OPT.heads, OPT.kv_heads), num_layers=OPT.layers), None),
    "decode 64x4k multi-query": (Paged(((4 * K, 1),) * 64, (32, 1)), None),
    "decode 64x4k head 64": (Paged(((4 * K, 1),) * 64, size=64, num_layers=16), None),
    "prefill 512": (Paged(((512, 512),)), None),
    "prefill 2k": (Paged(((2 * K, 2 * K),)), None),
    "prefill 8k": (Paged(((8 * K, 8 * K),)), Target("TFLOP/s", 350)),
    "prefill 16 x 500": (Paged(((500, 500),) * 16), None),
    "prefill 512 after 8k": (Paged(((8 * K + 512, 512),)), None),
    "prefill 512 after 32k": (Paged(((32 * K + 512, 512),)), None),
    "prefill 8k window 4k": (Paged(((8 * K, 8 * K),), window=4 * K), None),
    "prefill 2k OPT-13B": (Paged(((2 * K, 2 * K),), (OPT.heads, OPT.kv_heads), num_layers=OPT.layers), None),
    "prefill 2k deterministic": (Paged(((2 * K, 2 * K),), deterministic=True), None),
    "mixed 63x4k + 512 after 4k": (Paged(((4 * K, 1),) * 63 + ((4 * K + 512, 512),)), None),
    "cascade 64 x (8k shared + 128)": (Paged(((8 * K + 128, 1),) * 64, prefix=8 * K), Target("ratio", 2, "unshared")),
}


def _case(spec: Paged, target: Target | None, setting: Setting) -> Work:
    if setting.tiny:
        spec = _tiny(spec)
    spec = replace(spec, dtype=setting.dtype)
    spec = replace(spec, used=min(spec.num_layers, num_sets(spec.num_bytes) if not setting.tiny else 2))
    case = PagedCase(spec, setting.device)
    rows = case.rows()

    def call(which: int, rows: PagedRows = rows) -> torch.Tensor:
        return paged_attention(
            case.queries[which], case.layers[which], rows, case.scale, spec.window, case.slopes, case.kv_scales
        )

    def check() -> float:
        with poisoned_allocations():
            return worst(*(case.error(call(which), which) for which in {0, spec.used - 1}))

    def first() -> torch.Tensor:
        """From lengths on the host to the first layer's result; the other layers need the last part only."""
        return call(0, case.rows())

    calls = [partial(call, which) for which in range(spec.used)]
    others = {} if spec.static else peers.attention(case, PEERS)
    if spec.prefix:
        unshared = case.rows(shared=False)
        others["unshared"] = lambda: Peer(
            [partial(call, which, unshared) for which in range(spec.used)], lambda: case.error(call(0, unshared))
        )
    return Work(
        calls,
        check,
        num_bytes=spec.num_bytes,
        flops=spec.flops,
        dtype=str(spec.dtype).removeprefix("torch."),
        target=target,
        extras={
            "first layer from idle": lambda: hosted(first),
            "layer from idle": lambda: hosted(calls[0]),
            "host alone, first layer": lambda: issued(first),
            "host alone, layer": lambda: issued(calls[0]),
        },
        prepare_peers=case.clean,
        peers=others,
    )


def _tiny(spec: Paged) -> Paged:
    """The same mixture with lengths and heads cut to what an interpreter can do."""

    def cut(n: int) -> int:
        return n if n == 1 else max(2, n // 64 if n > 512 else n // 16)

    prefix = cut(spec.prefix) // 16 * 16 if spec.prefix else 0
    rows = tuple((max(cut(length) + (length % 2), cut(new), prefix + 1), cut(new)) for length, new in spec.rows)
    group = min(4, spec.heads[0] // spec.heads[1])
    window = None if spec.window is None else max(3, spec.window // 64)
    return replace(spec, rows=rows[-6:], heads=(2 * group, 2), size=16, num_layers=3, window=window, prefix=prefix)


CASES: dict[str, Case] = {name: partial(_case, *spec) for name, spec in SPECS.items()}
