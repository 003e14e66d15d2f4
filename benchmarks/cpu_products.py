"""bfloat16 products on a CPU by number of rows: our loop beside oneDNN's; where oneDNN does not compute in bfloat16,
beside torch's of the same weights in float32.

    python -m benchmarks.cpu_products [--rows 1,2,4,8,16,32,64,160] [--repeat 15]

The weights are those of m160's layers and its head, each layer with its own, so that all are read from memory in every
round; rounds of both alternate. Milliseconds for one round, medians; GB/s of weights and GFLOP/s are ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from quire.kernels.linear import packed_product

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 768, 2048, 32000, 12
SHAPES = [(3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
"""Outputs and inputs of a layer's weights."""

Round = Callable[[dict[int, torch.Tensor]], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,160")
    parser.add_argument("--repeat", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    weights = [torch.randn(shape).mul_(0.02).bfloat16() for shape in SHAPES * LAYERS + [(VOCABULARY, HIDDEN)]]
    products = [found for weight in weights if (found := packed_product(weight)) is not None]
    if len(products) < len(weights):
        raise SystemExit("our loop does not take these weights here: it needs a CPU with AVX2, and without AMX")
    elements = sum(weight.numel() for weight in weights)
    in_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if in_bfloat16:
        others = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]
    else:
        others = [weight.float() for weight in weights]

    def by_others(x: dict[int, torch.Tensor]) -> None:
        for weight, copy in zip(weights, others, strict=True):
            if in_bfloat16:
                torch.ops.mkldnn._linear_pointwise(x[weight.shape[1]], copy, None, "none", [], "")
            else:
                F.linear(x[weight.shape[1]].float(), copy)

    def by_us(x: dict[int, torch.Tensor]) -> None:
        for weight, (multiply, packed) in zip(weights, products, strict=True):
            multiply(x[weight.shape[1]], packed, None)

    print(f"{torch.get_num_threads()} threads; {2 * elements / 1e6:.0f} MB of weights")
    print(
        f"{'rows':>5} {'oneDNN' if in_bfloat16 else 'float32':>8} {'ours':>8} {'ratio':>6} {'GB/s':>6} {'GFLOP/s':>8}"
    )
    for rows in map(int, arguments.rows.split(",")):
        x = {inputs: torch.randn(rows, inputs).bfloat16() for inputs in (HIDDEN, INTERMEDIATE)}
        theirs, ours = (statistics.median(times) for times in _alternate((by_others, by_us), x, arguments.repeat))
        cells = f"{theirs * 1e3:8.2f} {ours * 1e3:8.2f} {theirs / ours:6.2f}"
        print(f"{rows:5} {cells} {2 * elements / ours / 1e9:6.1f} {2 * elements * rows / ours / 1e9:8.0f}", flush=True)


def _alternate(rounds: tuple[Round, Round], x: dict[int, torch.Tensor], repeat: int) -> list[list[float]]:
    times: list[list[float]] = [[], []]
    for _ in range(repeat):
        for of_round, run in zip(times, rounds, strict=True):
            started = time.perf_counter()
            run(x)
            of_round.append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
