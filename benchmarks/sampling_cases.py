"""From logits to tokens, for Llama 3's vocabulary: what ends every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import numpy as np
import torch

from benchmarks import peers, shapes
from benchmarks.oracles import poisoned_allocations, relative_error, worst
from benchmarks.timing import Timing, hosted, num_sets, replayed, streamed
from benchmarks.work import Case, Peer, Setting, Target, Work
from quire.kernels import dispatch, sampling

ROWS = (1, 64, 512)
TOP_K, TOP_P = 50, 0.9


@contextmanager
def _torch_form() -> Iterator[None]:
    with mock.patch.object(dispatch, "on_gpu", return_value=False):
        yield


def _logits(rows: int, setting: Setting) -> list[torch.Tensor]:
    """Peaked as a model's are: a few likely tokens far above the bulk."""
    rows, vocab = (min(rows, 3), 1000) if setting.tiny else (rows, shapes.sizes("llama-3.1-8b").vocab)
    sets = 2 if setting.tiny else num_sets(4 * rows * vocab)
    made = []
    for _ in range(sets):
        x = torch.randn(rows, vocab, device=setting.device).mul_(2.5)
        likely = torch.randint(0, vocab, (rows, 40), device=setting.device)
        x.scatter_add_(1, likely, 6 * torch.rand(rows, 40, device=setting.device))
        made.append(x)
    return made


def _columns(rows: int, temperature: float, top_k: int, top_p: float) -> sampling.Columns:
    rng = np.random.default_rng()
    return sampling.Columns(
        temperature=np.full(rows, temperature, np.float32),
        top_k=np.full(rows, top_k, np.int32),
        top_p=np.full(rows, top_p, np.float32),
        min_p=np.zeros(rows, np.float32),
        seed=rng.integers(0, 2**63, rows).astype(np.uint64),
        position=rng.integers(0, 8192, rows),
    )


def _differ(got: torch.Tensor, want: torch.Tensor) -> float:
    """Share of rows with another token."""
    return float((got != want).double().mean())


def _greedy(rows: int, setting: Setting) -> Work:
    logits = _logits(rows, setting)

    def check() -> float:
        fresh = _logits(rows, setting)[0]
        with poisoned_allocations():
            return _differ(sampling.greedy(fresh), fresh.argmax(-1))

    return Work(
        [partial(sampling.greedy, x) for x in logits],
        check,
        tolerance=0,
        num_bytes=logits[0].numel() * 4,
        peers={"torch": lambda: Peer([partial(torch.argmax, x, -1) for x in logits])},
    )


def _pick(rows: int, temperature: float, top_k: int, top_p: float, target: Target | None, setting: Setting) -> Work:
    logits = _logits(rows, setting)
    columns = _columns(len(logits[0]), temperature, top_k, top_p)
    calls = [partial(sampling.pick, x, columns) for x in logits]

    def check() -> float:
        errors = []
        for fresh in _logits(rows, setting)[:2]:
            with _torch_form():
                want = sampling.pick(fresh, columns)
            with poisoned_allocations():
                errors.append(_differ(sampling.pick(fresh, columns), want))
        return float(np.mean(errors))

    cut = bool(top_k) or top_p < 1
    others: dict[str, Callable[[], Peer]] = {
        "torch": lambda: Peer([partial(_torch_pick, x, temperature, top_k, top_p) for x in logits], how=streamed)
    }
    if cut:
        others |= peers.flashinfer_sampling(logits, top_k, top_p)
    return Work(
        calls,
        check,
        # The noise of the two forms agrees to a millionth: a rare tie may fall to the other token.
        tolerance=0.01,
        num_bytes=logits[0].numel() * 4,
        how=streamed,
        target=target,
        extras={"kernels alone": lambda: _kernels_alone(logits, columns), "from idle": lambda: hosted(calls[0])},
        peers=others,
    )


def _kernels_alone(logits: list[torch.Tensor], columns: sampling.Columns) -> Timing:
    """The settings uploaded before: a graph has no host."""
    from quire.kernels.gpu import sampling as gpu

    words = gpu._settings(columns, logits[0].shape[1])
    (settings,) = gpu._upload([words], logits[0].device)
    return replayed([partial(gpu._pick, x, settings, words[:, 0]) for x in logits])


def _torch_pick(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """As it is commonly written: sorted where there is a cut, and drawn from the probabilities."""
    x = logits / temperature
    if not top_k and top_p >= 1:
        return x.softmax(-1).multinomial(1)[:, 0]
    values, tokens = x.sort(dim=-1, descending=True)
    if top_k:
        values = values.masked_fill(torch.arange(x.shape[1], device=x.device) >= top_k, -torch.inf)
    shares = values.softmax(-1)
    shares = shares.masked_fill(shares.cumsum(-1) - shares >= top_p, 0)
    return tokens.gather(1, shares.multinomial(1))[:, 0]


def _log_probabilities(rows: int, k: int, setting: Setting) -> Work:
    logits = _logits(rows, setting)
    tokens = torch.randint(0, logits[0].shape[1], (len(logits[0]),), device=setting.device)

    def check() -> float:
        fresh = _logits(rows, setting)[0]
        everything = fresh.double().log_softmax(-1)
        best = everything.topk(k, -1)
        want = torch.cat((everything.gather(1, tokens[:, None]), best.values), 1)
        with poisoned_allocations():
            ids, values, ranks = sampling.log_probabilities(fresh, tokens, k)
        own = everything.gather(1, tokens[:, None])
        rank = 1 + (fresh > fresh.gather(1, tokens[:, None])).sum(-1)
        wrong = _differ(ranks, rank) + _differ(ids[:, 0], tokens)
        # What is listed has the values that it is listed with, whatever the order of equals.
        listed = relative_error(everything.gather(1, ids), torch.cat((own, best.values), 1))
        return worst(relative_error(values, want), listed, 1.0 if wrong else 0.0)

    def plain(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        everything = x.log_softmax(-1)
        return everything.gather(1, tokens[:, None]), everything.topk(k, -1).values

    return Work(
        [partial(sampling.log_probabilities, x, tokens, k) for x in logits],
        check,
        tolerance=1e-5,
        num_bytes=logits[0].numel() * 4,
        peers={"torch": lambda: Peer([partial(plain, x) for x in logits])},
    )


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for rows in ROWS:
        found[f"sample {rows} greedy"] = partial(_greedy, rows)
        found[f"sample {rows} temperature"] = partial(_pick, rows, 0.8, 0, 1.0, None)
        found[f"sample {rows} top-k top-p"] = partial(_pick, rows, 0.8, TOP_K, TOP_P, Target("us", 1000))
        found[f"sample {rows} top-p"] = partial(_pick, rows, 0.8, 0, TOP_P, None)
    for rows in ROWS[1:]:
        found[f"log-probabilities {rows}, 5 best"] = partial(_log_probabilities, rows, 5)
    return found


CASES = _cases()
