"""What 8-bit keys and values change: `python -m benchmarks.float8 [MODEL]`, the bundled model by default.

Greedy continuations with the cache in the model's own type and in e4m3, from the same prompts: how many tokens are
equal up to the first that is not, and how far log-probabilities lie apart until then.
"""

from __future__ import annotations

import argparse

import numpy as np

from quire.cluster.llm import LLM, SamplingParams

NUM_PROMPTS, NUM_TOKENS = 64, 48
OPENINGS = ("Once upon a time", "Tell me a story about a", "Who is the", "What does the", "One day a", "Why did the")


def outputs(model: str | None, prompts: list[str], kv_cache_dtype: str) -> list[tuple[list[int], list[float]]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    with LLM(model, device="cpu", kv_cache_dtype=kv_cache_dtype, max_num_seqs=NUM_PROMPTS) as llm:
        found = llm.generate(prompts, params, use_tqdm=False)
    result = []
    for output in found:
        first = output.outputs[0]
        assert first.logprobs is not None
        values = [step[token].logprob for token, step in zip(first.token_ids, first.logprobs, strict=True)]
        result.append((first.token_ids, values))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a folder  [default: the bundled model]")
    model = parser.parse_args().model
    rng = np.random.default_rng(0)
    words = [
        "fox",
        "bear",
        "moon",
        "river",
        "boat",
        "apple",
        "small",
        "kind",
        "red",
        "lost",
        "night",
        "garden",
        "friend",
        "window",
        "song",
    ]
    prompts = [f"{rng.choice(OPENINGS)} {' '.join(rng.choice(words, rng.integers(1, 12)))}" for _ in range(NUM_PROMPTS)]
    own, stored = outputs(model, prompts, "auto"), outputs(model, prompts, "fp8")
    equal, apart = 0, []
    for (tokens, values), (others, other_values) in zip(own, stored, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))
        equal += same
        apart += [abs(a - b) for a, b in zip(values[: same + 1], other_values[: same + 1], strict=True)]
    whole = sum(tokens == others for (tokens, _), (others, _) in zip(own, stored, strict=True))
    print(f"{NUM_PROMPTS} prompts, {NUM_TOKENS} tokens each, greedy")
    share = equal / (NUM_PROMPTS * NUM_TOKENS)
    print(f"equal up to the first difference: {share:.1%} of the tokens; whole outputs: {whole}")
    print(f"log-probabilities apart: mean {np.mean(apart):.4f}, 99th percentile {np.quantile(apart, 0.99):.4f}")


if __name__ == "__main__":
    main()
