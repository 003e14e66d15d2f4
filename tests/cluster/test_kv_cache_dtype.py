"""`--kv-cache-dtype fp8`: from the choice to the pool, and results that hardly change."""

from __future__ import annotations

import pytest

from quire.cluster.config import ConfigError, EngineConfig, resolve
from quire.cluster.llm import LLM, SamplingParams
from quire.cluster.plan import make_plan

PROMPTS = ["Once upon a time", "Tom", "One day a little girl went to the park with her dog. The dog"]
PARAMS = SamplingParams(temperature=0, max_tokens=8, logprobs=0)


def run(kv_cache_dtype: str) -> tuple[list[float], int]:
    """The log-probability of each prompt's first token, and the blocks of a pool of 1 MiB."""
    with LLM(
        device="cpu", dtype="float32", kv_cache_dtype=kv_cache_dtype, kv_cache_memory_bytes=1 << 20, max_model_len=64,
        max_num_batched_tokens=7, max_num_seqs=3,
    ) as llm:  # fmt: skip
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        llm.scheduler.audit()
        first = [next(iter(output.outputs[0].logprobs[0].values())) for output in outputs]
        return [entry.logprob for entry in first], llm.scheduler.memory().blocks_total


def test_what_is_stored_in_8_bits_is_nearly_what_was_computed() -> None:
    own, few = run("auto")
    stored, many = run("fp8")
    assert own != stored, "nothing was stored in 8 bits"
    assert own == pytest.approx(stored, abs=0.3)
    assert 4 * few <= many < 4 * (few + 1)


def test_a_plan_counts_what_is_stored() -> None:
    def bytes_per_token(kv_cache_dtype: str) -> int:
        engine = resolve(EngineConfig(device="cpu", dtype="float32", kv_cache_dtype=kv_cache_dtype))
        return make_plan(engine).kv_bytes_per_token

    assert bytes_per_token("auto") == 4 * bytes_per_token("fp8")


def test_other_types_are_refused_with_those_that_work() -> None:
    with pytest.raises(ConfigError, match=r"kv-cache-dtype.*auto.*fp8"):
        resolve(EngineConfig(device="cpu", kv_cache_dtype="fp4"))
