"""Output tokens per second of the whole engine in one process: fixed prompts, exact output lengths, no server.

    python -m benchmarks.offline --model DIR --workload chat
    python -m benchmarks.offline --model m160 --workload path/to/workloads.py:chat --repeat 2

`--model` is a folder, or the name of a shape in benchmarks/shapes.py, which then gets random-normal weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

from benchmarks import shapes, workloads
from quire.cluster.llm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="m160")
    parser.add_argument("--workload", default="chat")
    parser.add_argument("--repeat", type=int, default=2, help="runs; the first one warms up")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    parser.add_argument("--block-size", type=int, default=16)
    arguments = parser.parse_args()
    jobs = workloads.load(arguments.workload)
    with tempfile.TemporaryDirectory() as folder:
        run(arguments, jobs, Path(folder))


def run(arguments: argparse.Namespace, jobs: list[workloads.Job], scratch: Path) -> None:
    named = arguments.model in shapes.SHAPES
    started = time.perf_counter()
    llm = LLM(
        str(shapes.write(arguments.model, scratch)) if named else arguments.model,
        load_format="dummy" if named else "auto",
        device=arguments.device,
        dtype=arguments.dtype,
        tensor_parallel_size=arguments.tensor_parallel_size,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        block_size=arguments.block_size,
    )
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "dtype": llm.config.dtype}
    report(machine, model=arguments.model, load_s=round(time.perf_counter() - started, 1))
    params = [
        SamplingParams(max_tokens=job.output_tokens, n=job.n, ignore_eos=True, temperature=0 if job.n == 1 else 1)
        for job in jobs
    ]
    for repeat in range(arguments.repeat):
        preempted = llm.scheduler.counters.num_preemptions
        steps = llm.scheduler.counters.num_steps
        start = time.perf_counter()
        outputs = llm.generate([job.prompt for job in jobs], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        assert tokens == sum(job.output_tokens * job.n for job in jobs)
        report(
            workload=arguments.workload.rpartition("/")[2],
            run=repeat,
            seconds=round(seconds, 2),
            output_tokens=tokens,
            output_tokens_per_s=round(tokens / seconds, 1),
            steps=llm.scheduler.counters.num_steps - steps,
            preemptions=llm.scheduler.counters.num_preemptions - preempted,
            peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        )
    llm.scheduler.audit()
    llm.close()


def report(*parts: dict[str, object], **values: object) -> None:
    print(json.dumps({key: value for part in (*parts, values) for key, value in part.items()}), flush=True)


if __name__ == "__main__":
    main()
