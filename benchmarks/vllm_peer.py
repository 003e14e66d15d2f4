"""vLLM, given the work of benchmarks/offline.py in the same way: a process of its own, lines of JSON. Needs vLLM and
nothing of ours but the workloads, so that it runs in an environment of vLLM's own:

    PATH_OF_VLLM/python -m benchmarks.vllm_peer --model DIR --workload chat

Prefix caching is on, as by default, and emptied before every run.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import engines
from benchmarks.workloads import Job


def main() -> None:
    arguments = engines.options(__doc__).parse_args()
    engines.quiet()
    if arguments.device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{len(os.sched_getaffinity(0)) - 1}")
    began = time.perf_counter()
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            engines.folder_of(arguments.model, Path(folder)),
            load_format="dummy" if engines.is_shape(arguments.model) else "auto",
            skip_tokenizer_init=True,
            dtype=arguments.dtype or "auto",
            max_model_len=arguments.max_model_len,
            max_num_seqs=arguments.max_num_seqs,
        )

    def generate(jobs: Sequence[Job]) -> int:
        llm.reset_prefix_cache()
        params = [
            SamplingParams(
                max_tokens=job.output_tokens, n=job.n, ignore_eos=True, temperature=job.temperature, detokenize=False
            )
            for job in jobs
        ]
        outputs = llm.generate([{"prompt_token_ids": job.prompt} for job in jobs], params, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    engines.measure("vllm", arguments, generate, began)


if __name__ == "__main__":
    main()
