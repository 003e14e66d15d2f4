"""The offline API: a model in this process, prompts in, results out.

Shapes are those that vLLM's users know:

    from quire.cluster.llm import LLM, SamplingParams
    outputs = LLM("path/to/model").generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=64))
    print(outputs[0].outputs[0].text)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from tqdm import tqdm

from quire.cluster.config import EngineConfig, resolve
from quire.cluster.local import LocalExecutor
from quire.cluster.text import NoTokenizerError, SampleText, TextError, Tokenizer
from quire.scheduler.engine import Engine
from quire.scheduler.params import InvalidRequest, SamplingParams
from quire.scheduler.plan import Answer, Logprobs, TokenEvent
from quire.scheduler.request import Request, check_cache_salt, check_prompt
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import FinishReason
from quire.worker.compiled import compile_ahead

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or one of them as {"prompt": text} or {"prompt_token_ids": ids}, where "cache_salt" may be beside
it: what is computed for the prompt is shared only with prompts of the same salt."""

_UNBOUNDED = 1 << 40
"""Sequences that may wait: all of a call's."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one candidate for one token."""

    logprob: float
    rank: int
    """1 is the most likely."""
    decoded_token: str | None


@dataclass(slots=True)
class CompletionOutput:
    """One sample."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Where log-probabilities were asked for, and of ranked answers."""
    logprobs: list[dict[int, Logprob]] | None = None
    """One dictionary per token, by token id: the sampled one, and the most likely ones that were asked for."""
    finish_reason: str | None = None
    """"stop" or "length"; "error" where the model's logits were not numbers, which end this sample alone."""
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it; None for the model's own end."""
    score: float | None = None
    """What a ranked answer (best_of, beam_width) was ranked by; a stop string cuts its text later."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its samples; ranked answers best first."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    """A model loaded into this process: scheduler, KV pool and worker, without Ray and without a server.

    `model` is a folder with config.json, safetensors and tokenizer; None takes the bundled model. Arguments left None
    are chosen as `quire serve` chooses them. Raises ValueError, in one sentence, for what cannot be served. With
    tensor_parallel_size above 1 the other ranks are child processes, so the calling script needs the usual
    `if __name__ == "__main__":` guard.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        kv_cache_dtype: str | None = None,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        block_size: int | None = None,
        gpu_memory_utilization: float | None = None,
        kv_cache_memory_bytes: int | None = None,
        num_gpu_blocks_override: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        swap_space: float | None = None,
        preemption_mode: str | None = None,
        enable_prefix_caching: bool | None = None,
        seed: int = 0,
        load_format: str = "auto",
        deterministic: bool = False,
        enforce_eager: bool = False,
        run_ahead: int | None = None,
    ) -> None:
        given: dict[str, Any] = dict(
            model=model, device=device, dtype=dtype, kv_cache_dtype=kv_cache_dtype,
            tensor_parallel_size=tensor_parallel_size, max_model_len=max_model_len, block_size=block_size,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes, num_gpu_blocks_override=num_gpu_blocks_override,
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, swap_space=swap_space,
            preemption_mode=preemption_mode, enable_prefix_caching=enable_prefix_caching, seed=seed,
            max_num_waiting=_UNBOUNDED, load_format=load_format,
            deterministic=deterministic, enforce_eager=enforce_eager, run_ahead=run_ahead,
        )  # fmt: skip
        chosen = {name: value for name, value in given.items() if value is not None}
        self.config = resolve(EngineConfig(**chosen), offline=True)
        compile_ahead(self.config.worker_config(0), self.config.spec.head_dim)
        self.tokenizer = _tokenizer(self.config.model)
        self._executor = LocalExecutor(self.config.worker_config(0))
        self._limits = self.config.scheduler_config(self._executor.num_blocks, self._executor.descriptions)
        self._reserved: dict[str, tuple[tuple[int, ...], str]] = {}
        """Token ids and salt of the prefixes that are kept, by name."""
        self._start_afresh()
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue every prompt; results come in the prompts' order. One `sampling_params` for
        all, or one per prompt.

        Raises InvalidRequest before anything runs if any of them cannot be served."""
        return self._serve(prompts, sampling_params, use_tqdm, in_text=True)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or several: lists of {"role": …, "content": …}."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        prompts = [self._require_tokenizer().encode_chat(conversation) for conversation in conversations]
        return self._serve(prompts, sampling_params, use_tqdm, in_text=False)

    def reserve_prefix(self, name: str, prefix: Prompt) -> None:
        """Keep what prompts begin with: it is computed once, with the next call, and never evicted. Raises
        InvalidRequest where it cannot be kept."""
        _, ids = self._encode(prefix)
        check_prompt(ids, self.config.limits)
        kept = tuple(ids), _salt(prefix)
        check_cache_salt(kept[1])
        self._scheduler.reserve_prefix(name, *kept)
        self._reserved[name] = kept

    def release_prefix(self, name: str) -> None:
        """Keep it no longer. Raises InvalidRequest where none of that name is kept."""
        if not self._scheduler.release_prefix(name):
            raise InvalidRequest("name", f"no prefix {name!r} is reserved")
        del self._reserved[name]

    def reset_prefix_cache(self) -> int:
        """Forget what no request in progress and no reserved prefix holds; returns how many blocks that was."""
        return self._scheduler.pool.forget_free()

    def close(self) -> None:
        """Free the model and end the other ranks' processes."""
        self._executor.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def scheduler(self) -> Scheduler:
        """For looking in: counters, memory, audit()."""
        return self._scheduler

    def _serve(self, prompts: Any, params: Any, use_tqdm: bool, in_text: bool) -> list[RequestOutput]:
        """`in_text`: an output goes on where its prompt ends; otherwise it is a text of its own."""
        items = _several(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(items)
        if len(each) != len(items):
            raise InvalidRequest(
                "sampling_params", f"{len(items)} prompts but {len(each)} SamplingParams; give one, or one each"
            )
        jobs = [self._job(item, param, in_text) for item, param in zip(items, each, strict=True)]
        try:
            for job in jobs:
                self._scheduler.add(job.request)
            self._run({job.request.request_id: job for job in jobs}, use_tqdm)
        except BaseException:
            # An interrupt can come in the middle of a step: nothing may be left behind for the next call.
            self._start_afresh()
            raise
        return [job.output() for job in jobs]

    def _start_afresh(self) -> None:
        """Scheduler and worker without any sequence but the reserved."""
        self._executor.reset()
        self._scheduler = Scheduler(self._limits)
        for name, kept in self._reserved.items():
            self._scheduler.reserve_prefix(name, *kept)
        self._engine = Engine(self._scheduler, self._executor, self.config.run_ahead)

    def _job(self, prompt: Any, params: Any, in_text: bool) -> _Job:
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(
                "sampling_params", f"sampling_params must be SamplingParams, or a list of them, not {params!r:.80}"
            )
        text, ids = self._encode(prompt)
        seed = params.seed
        if seed is None:
            seed = _mix(self.config.seed, self._num_requests)
        request = Request.checked(str(self._num_requests), ids, params, seed, self.config.limits, _salt(prompt))
        if params.stop:
            self._require_tokenizer()
        self._num_requests += 1
        return _Job(request, text, self.tokenizer, in_text)

    def _encode(self, prompt: Any) -> tuple[str | None, Sequence[int]]:
        inner = prompt
        if isinstance(prompt, Mapping):
            inner = prompt.get("prompt_token_ids", prompt.get("prompt"))
        if isinstance(inner, str):
            return inner, self._require_tokenizer().encode(inner)
        if not _is_ids(inner):
            raise InvalidRequest(
                "prompt",
                f"a prompt is text, a list of token ids, or one of them as {{'prompt': …}} or"
                f" {{'prompt_token_ids': …}}, unlike {prompt!r:.80}",
            )
        return None, inner

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TextError(f"{self.config.model} has no tokenizer: give token ids, and no stop strings")
        return self.tokenizer

    def _run(self, jobs: dict[str, _Job], use_tqdm: bool) -> None:
        with tqdm(total=len(jobs), desc="requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
            tokens = 0
            while self._scheduler.has_work:
                events = self._engine.step()
                tokens += len(events) + sum(len(answer.token_ids) for answer in events.answers)
                for event in events:
                    job = jobs[event.sequence.request.request_id]
                    if job.take(event):
                        self._scheduler.cancel(job.request.request_id, event.sequence.index)
                    bar.update(job.newly_done())
                for answer in events.answers:
                    job = jobs[answer.request.request_id]
                    job.take_answer(answer)
                    bar.update(job.newly_done())
                if events.token_ids or events.answers:
                    bar.set_postfix_str(
                        f"{tokens / max(bar.format_dict['elapsed'], 1e-6):.1f} output tok/s", refresh=False
                    )


class _Job:
    """A request on its way to a RequestOutput."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer | None, in_text: bool) -> None:
        self.request = request
        self.prompt = prompt
        self._tokenizer = tokenizer
        params = request.params
        self._samples = [CompletionOutput(index) for index in range(params.n)]
        # What decides about a space at the start.
        context = request.prompt_token_ids[-16:] if in_text else ()
        self._texts = [_text(tokenizer, params, context) for _ in self._samples] if tokenizer else []
        if params.logprobs is not None:
            for sample in self._samples:
                sample.logprobs, sample.cumulative_logprob = [], 0.0
        self._counted = False

    def take(self, event: TokenEvent) -> bool:
        """Note a token; True when a stop string ends a sample whose sequence would go on."""
        sample = self._samples[event.sequence.index]
        return self._take(sample, event.token_id, event.finish_reason, event.logprobs)

    def take_answer(self, answer: Answer) -> None:
        """Note a ranked answer, up to the first stop string in it."""
        sample = self._samples[answer.index]
        last = len(answer.token_ids) - 1
        for position, token in enumerate(answer.token_ids):
            reason = answer.finish_reason if position == last else None
            if self._take(sample, token, reason, answer.logprobs[position] if answer.logprobs else None):
                break
        sample.finish_reason = sample.finish_reason or answer.finish_reason.value  # without a token: an error
        sample.cumulative_logprob, sample.score = answer.cumulative_logprob, answer.score

    def _take(
        self, sample: CompletionOutput, token: int, reason: FinishReason | None, logprobs: Logprobs | None
    ) -> bool:
        if reason is not None:
            sample.finish_reason = reason.value
            if reason is FinishReason.STOP and token in self.request.params.stop_token_ids:
                sample.stop_reason = token
        stop = None
        if reason is not FinishReason.ERROR:
            stop = self._add_token(sample, token, logprobs)
        if stop is None and reason is not None and self._texts:
            rest, stop = self._texts[sample.index].finish()
            sample.text += rest
        if stop is not None:
            sample.finish_reason, sample.stop_reason = "stop", stop
        return stop is not None and reason is None

    def newly_done(self) -> int:
        """1 once, when all samples have ended."""
        if self._counted or any(sample.finish_reason is None for sample in self._samples):
            return 0
        self._counted = True
        return 1

    def output(self) -> RequestOutput:
        return RequestOutput(self.request.request_id, self.prompt, list(self.request.prompt_token_ids), self._samples)

    def _add_token(self, sample: CompletionOutput, token: int, logprobs: Logprobs | None) -> str | None:
        """Returns the stop string that the token completes."""
        sample.token_ids.append(token)
        if logprobs is not None:
            self._note_logprobs(sample, logprobs)
        if not self._texts:
            return None
        text, stop = self._texts[sample.index].feed(token)
        sample.text += text
        return stop

    def _note_logprobs(self, sample: CompletionOutput, logprobs: Logprobs) -> None:
        assert sample.logprobs is not None and sample.cumulative_logprob is not None
        entries: dict[int, Logprob] = {}
        ranks = [logprobs.rank, *range(1, len(logprobs.token_ids))]
        for token, value, rank in zip(logprobs.token_ids, logprobs.values, ranks, strict=True):
            decoded = self._tokenizer.token_text(token) if self._tokenizer else None
            entries.setdefault(token, Logprob(value, rank, decoded))
        sample.logprobs.append(entries)
        sample.cumulative_logprob += logprobs.values[0]


def _text(tokenizer: Tokenizer, params: SamplingParams, context: Sequence[int]) -> SampleText:
    return SampleText(
        tokenizer,
        stops=params.stop or (),
        include_stop=params.include_stop_str_in_output,
        stop_token_ids=params.stop_token_ids or (),
        min_tokens=params.min_tokens,
        skip_special_tokens=params.skip_special_tokens,
        context=context,
    )


def _tokenizer(folder: str) -> Tokenizer | None:
    try:
        return Tokenizer.from_pretrained(folder)
    except NoTokenizerError:
        return None


def _several(prompts: Any) -> list[Any]:
    """The prompts, of which one may be given by itself."""
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        return [prompts]
    several = list(prompts)
    return [several] if several and isinstance(several[0], int) else several


def _salt(prompt: Any) -> str:
    salt = prompt.get("cache_salt", "") if isinstance(prompt, Mapping) else ""
    if not isinstance(salt, str):
        raise InvalidRequest("cache_salt", f"a cache_salt is a string, unlike {salt!r:.80}")
    return salt


def _is_ids(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
        return False
    return all(isinstance(token, int) for token in value)


def _mix(seed: int, number: int) -> int:
    """A seed for the number-th request: splitmix64's finalizer."""
    mask = (1 << 64) - 1
    value = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
