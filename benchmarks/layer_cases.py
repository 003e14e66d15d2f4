"""The operations between the matrix products of a layer, in the sizes of Llama-3.1-8B (layer norm and the plain
activations: of OPT-13B), and the matrix product that does not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import shapes
from benchmarks.oracles import poison, poisoned_allocations, relative_error, worst
from benchmarks.timing import num_sets
from benchmarks.work import Case, Peer, Setting, Target, Work

TOKENS = (1, 64, 2048)
EPS = 1e-5
BLOCK_SIZE = 16


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.double()


def _errors(got: Any, want: Any) -> list[float]:
    """Of a result or of a tuple of them."""
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    return [relative_error(a, b) for a, b in pairs]


def _rowwise(
    setting: Setting,
    tokens: int,
    width: int,
    num_inputs: int,
    parameters: Callable[[int, torch.Tensor], tuple[torch.Tensor, ...]],
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    exact: Callable[..., Any],
    values_per_column: float,
    against: str = "copy",
) -> Work:
    """An operation on [T, width] tensors that treats each token alone. `values_per_column`: read and written, of the
    width and for each token."""
    if setting.tiny:
        tokens, width = min(tokens, 5), 48
    like = torch.empty(tokens, width, device=setting.device, dtype=setting.dtype)
    fixed = parameters(width, like)
    set_bytes = num_inputs * like.numel() * like.element_size()
    count = 2 if setting.tiny else num_sets(set_bytes)
    inputs = [[torch.randn_like(like) for _ in range(num_inputs)] for _ in range(count)]
    fresh = [[x.clone() for x in inputs[i]] for i in (0, -1)]

    def check() -> float:
        errors = []
        for tensors in fresh:
            want = exact(*[x.double() for x in tensors], *fixed)
            with poisoned_allocations():
                got = ours(*[x.clone() for x in tensors], *fixed)
            errors += _errors(got, want)
        return worst(*errors)

    return Work(
        [partial(ours, *tensors, *fixed) for tensors in inputs],
        check,
        num_bytes=values_per_column * like.numel() * like.element_size(),
        against=against,
        peers={"torch": lambda: Peer([partial(plain, *tensors, *fixed) for tensors in inputs])},
    )


def _weight(width: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.randn(width, device=like.device).to(like.dtype),)


def _weight_and_bias(width: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return *_weight(width, like), *_weight(width, like)


def _nothing(width: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: ARG001
    return ()


def _rms_norm(tokens: int, setting: Setting) -> Work:
    from quire.kernels import norm

    hidden = shapes.sizes("llama-3.1-8b").hidden
    return _rowwise(
        setting, tokens, hidden, 1, _weight,
        lambda x, w: norm.rms_norm(x, w, EPS), lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS), _rms, 2,
    )  # fmt: skip


def _add_rms_norm(tokens: int, setting: Setting) -> Work:
    from quire.kernels import norm

    def plain(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        total = x + residual
        return F.rms_norm(total, x.shape[-1:], weight, EPS), total

    def exact(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        return _rms(x + residual, weight), x + residual

    hidden = shapes.sizes("llama-3.1-8b").hidden
    return _rowwise(
        setting, tokens, hidden, 2, _weight, lambda x, r, w: norm.add_rms_norm(x, r, w, EPS), plain, exact, 4
    )


def _layer_norm(tokens: int, setting: Setting) -> Work:
    from quire.kernels import norm

    return _rowwise(
        setting, tokens, shapes.sizes("opt-13b").hidden, 1, _weight_and_bias,
        lambda x, w, b: norm.layer_norm(x, w, b, EPS), lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w.double(), b.double(), EPS), 2,
    )  # fmt: skip


def _add_layer_norm(tokens: int, setting: Setting) -> Work:
    from quire.kernels import norm

    def plain(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        total = x + residual
        return F.layer_norm(total, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), EPS), total

    return _rowwise(
        setting, tokens, shapes.sizes("opt-13b").hidden, 2, _weight_and_bias,
        lambda x, r, w, b: norm.add_layer_norm(x, r, w, b, EPS), plain, plain, 4,
    )  # fmt: skip


def _silu_and_mul(tokens: int, setting: Setting) -> Work:
    from quire.kernels import activation

    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    width = 2 * shapes.sizes("llama-3.1-8b").mlp
    return _rowwise(setting, tokens, width, 1, _nothing, activation.silu_and_mul, plain, plain, 1.5)


def _plain_activation(name: str, tokens: int, setting: Setting) -> Work:
    from quire.kernels import activation

    plain = {"gelu": F.gelu, "relu": F.relu}[name]
    ours = getattr(activation, name)
    return _rowwise(setting, tokens, shapes.sizes("opt-13b").mlp, 1, _nothing, ours, plain, plain, 2)


def _norm_rotate_write(tokens: int, options: frozenset[str], target: Target | None, setting: Setting) -> Work:
    """`options`: "qk-norm", "float8"."""
    from quire.kernels.qkv import norm_rotate_write

    sizes = shapes.sizes("llama-3.1-8b")
    heads, kv_heads, size, layers = sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.layers
    if setting.tiny:
        tokens, heads, kv_heads, size, layers = min(tokens, 21), 4, 2, 16, 3
    device, dtype, float8 = setting.device, setting.dtype, "float8" in options
    # Decoding tokens are each in a block of their own, a prompt's fill theirs.
    each = 1 if tokens <= 256 else BLOCK_SIZE
    num_blocks = -(-tokens // each) + 3
    blocks = torch.randperm(num_blocks, device=device)[: -(-tokens // each)]
    offsets = torch.arange(tokens, device=device) % BLOCK_SIZE
    slots = blocks.repeat_interleave(each)[:tokens] * BLOCK_SIZE + offsets
    if tokens > 1:
        slots[-1] = -1
    positions = torch.randint(0, 4096, (tokens,), device=device)
    angles = torch.outer(torch.arange(4096.0, device=device), 5e5 ** -(torch.arange(0, size, 2, device=device) / size))
    table = torch.cat((angles.cos(), angles.sin()), -1)
    weights = [torch.randn(size, device=device).to(dtype) for _ in range(2)] if "qk-norm" in options else [None, None]
    scales = torch.rand(2, kv_heads, device=device) + 0.5 if float8 else None
    shape = (num_blocks, layers, 2, BLOCK_SIZE, kv_heads, size)
    pool = torch.empty(shape, dtype=torch.float8_e4m3fn if float8 else dtype, device=device)
    qkv_shape = (tokens, heads + 2 * kv_heads, size)
    qkv = torch.randn(qkv_shape, device=device).to(dtype)

    def run(qkv: torch.Tensor, layer: int) -> torch.Tensor:
        return norm_rotate_write(qkv, pool[:, layer], slots, positions, table, False, *weights, EPS, scales)

    def turned(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            x = _rms(x, weight)
        cos, sin = table[positions].double()[:, None].chunk(2, -1)
        a, b = x.double().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def check() -> float:
        poison(pool)
        fresh = torch.randn(qkv_shape, device=device).to(dtype)
        q, k, v = fresh.split((heads, kv_heads, kv_heads), 1)
        with poisoned_allocations():
            got_q = run(fresh.clone(), 1)
        real = slots >= 0
        block, offset = slots[real] // BLOCK_SIZE, slots[real] % BLOCK_SIZE
        wide = pool.float()
        if int(wide.isfinite().sum()) != 2 * int(real.sum()) * kv_heads * size:
            return float("nan")
        stored = wide[block, 1, :, offset]  # [T, 2, Hkv, D]
        if scales is not None:
            stored = stored * scales[None, :, :, None]
        want = torch.stack((turned(k, weights[1]), v.double()), 1)[real]
        kv_error = relative_error(stored, want)
        # e4m3 keeps three bits of a number: a sixteenth at most, a 37th on average.
        return worst(relative_error(got_q, turned(q, weights[0])), kv_error / (5 if float8 else 1))

    stored_bytes = 2 * tokens * kv_heads * size * pool.element_size()
    read = qkv.numel() * qkv.element_size() + tokens * size * 4
    written = tokens * heads * size * qkv.element_size() + stored_bytes
    count = 2 if setting.tiny else num_sets(read)
    inputs = [torch.randn(qkv_shape, device=device).to(dtype) for _ in range(count)]

    def plain() -> Peer:
        return _torch_qkv(inputs, pool, slots, positions, table, weights, heads, kv_heads)

    return Work(
        [partial(run, x, i % layers) for i, x in enumerate(inputs)],
        check,
        num_bytes=read + written,
        against="copy",
        target=target,
        peers={} if float8 else {"torch": plain},
    )


def _torch_qkv(
    inputs: list[torch.Tensor], pool: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, table: torch.Tensor,
    weights: list[Any], heads: int, kv_heads: int,
) -> Peer:  # fmt: skip
    """The separate operations that the kernel replaces, in torch."""
    slots = slots.clamp(min=0)

    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    def run(x: torch.Tensor, layer: int) -> torch.Tensor:
        q, k, v = x.split((heads, kv_heads, kv_heads), 1)
        if weights[0] is not None:
            q, k = (F.rms_norm(y, y.shape[-1:], w, EPS) for y, w in zip((q, k), weights, strict=True))
        cos, sin = table[positions][:, None].chunk(2, -1)
        where = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        pool[:, layer, 0].index_put_(where, turn(k, cos, sin))
        pool[:, layer, 1].index_put_(where, v)
        return turn(q, cos, sin)

    return Peer([partial(run, x, i % pool.shape[1]) for i, x in enumerate(inputs)])


def _linear_invariant(tokens: int, name: str, setting: Setting) -> Work:
    from quire.kernels.linear import linear_invariant

    out_size, in_size = (80, 48) if setting.tiny else shapes.linears("llama-3.1-8b")[name]
    tokens = min(tokens, 19) if setting.tiny else tokens
    device, dtype = setting.device, setting.dtype
    weight_bytes = out_size * in_size * dtype.itemsize
    count = 2 if setting.tiny else num_sets(weight_bytes)
    weights = [torch.randn(out_size, in_size, device=device).to(dtype) for _ in range(count)]
    x = torch.randn(tokens, in_size, device=device).to(dtype)

    def check() -> float:
        want = x.double() @ weights[-1].double().T
        with poisoned_allocations():
            got = linear_invariant(x, weights[-1])
            # A row alone, and rows in other places, to the last bit: what the operation is for.
            order = torch.randperm(tokens, device=device)
            alone, moved = linear_invariant(x[:1], weights[-1]), linear_invariant(x[order], weights[-1])
        if not (torch.equal(alone, got[:1]) and torch.equal(moved, got[order])):
            return float("nan")
        return relative_error(got, want)

    return Work(
        [partial(linear_invariant, x, weight) for weight in weights],
        check,
        num_bytes=weight_bytes + (x.numel() + tokens * out_size) * dtype.itemsize,
        flops=2.0 * tokens * out_size * in_size,
        dtype=str(dtype).removeprefix("torch."),
        peers={"F.linear": lambda: Peer([partial(F.linear, x, weight) for weight in weights])},
    )


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    fast = Target("us", 8)
    for tokens in TOKENS:
        found[f"norm_rotate_write T={tokens}"] = partial(
            _norm_rotate_write, tokens, frozenset(), fast if tokens == 64 else None
        )
    found["norm_rotate_write T=64 qk-norm"] = partial(_norm_rotate_write, 64, frozenset({"qk-norm"}), None)
    found["norm_rotate_write T=64 float8"] = partial(_norm_rotate_write, 64, frozenset({"float8"}), None)
    for tokens in TOKENS:
        found[f"rms_norm T={tokens}"] = partial(_rms_norm, tokens)
        found[f"add_rms_norm T={tokens}"] = partial(_add_rms_norm, tokens)
        found[f"silu_and_mul T={tokens}"] = partial(_silu_and_mul, tokens)
    for tokens in TOKENS[1:]:
        found[f"layer_norm T={tokens}"] = partial(_layer_norm, tokens)
        found[f"add_layer_norm T={tokens}"] = partial(_add_layer_norm, tokens)
        found[f"gelu T={tokens}"] = partial(_plain_activation, "gelu", tokens)
        found[f"relu T={tokens}"] = partial(_plain_activation, "relu", tokens)
    for tokens in TOKENS:
        for name in ("qkv", "down"):
            found[f"linear_invariant {name} M={tokens}"] = partial(_linear_invariant, tokens, name)
    return found


CASES = _cases()
