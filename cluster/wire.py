"""The only file that knows both vocabularies: the scheduler's values and the wire's messages.

Integer arrays travel as packed little-endian int32. A plan is encoded once for all ranks; what differs between them,
the incarnation, is appended: concatenated protobuf messages are one message.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import chain

from quire.protos import generation_pb2, worker_pb2
from quire.scheduler.explaining.explain import Explanation, Moment, Sums
from quire.scheduler.params import InvalidRequest, SamplingParams
from quire.scheduler.plan import Admission, Logprobs, StepPlan, StepResult
from quire.scheduler.reserved import PrefixStatus
from quire.scheduler.sequence import FinishReason
from quire.scheduler.stats import Counters, MemoryUse

MAX_TOKENS_PER_MESSAGE = 256
"""With 20 log-probabilities each, far below the four megabytes that a client takes by default."""

FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}

_SCALARS = (
    "n", "best_of", "beam_width", "length_penalty", "max_tokens", "min_tokens", "temperature", "top_p", "top_k",
    "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "ignore_eos", "logprobs",
    "include_stop_str_in_output", "skip_special_tokens",
)  # fmt: skip

_EARLY_STOPPING: dict[int, bool | str] = {
    generation_pb2.EARLY_STOPPING_UNSPECIFIED: False,
    generation_pb2.EARLY_STOPPING_FALSE: False,
    generation_pb2.EARLY_STOPPING_TRUE: True,
    generation_pb2.EARLY_STOPPING_NEVER: "never",
}


def pack(values: Iterable[int]) -> bytes:
    return array("i", values).tobytes()


def _pack_all(records: tuple[tuple[int, ...], ...]) -> bytes:
    return pack(chain.from_iterable(records)) if records else b""


def pack_floats(values: Iterable[float]) -> bytes:
    return array("f", values).tobytes()


def unpack(data: bytes) -> tuple[int, ...]:
    return tuple(memoryview(data).cast("i"))


def unpack_floats(data: bytes) -> tuple[float, ...]:
    return tuple(memoryview(data).cast("f"))


# -- to and from workers


def encode_plan(plan: StepPlan, epoch: int) -> worker_pb2.StepPlan:
    return worker_pb2.StepPlan(
        epoch=epoch,
        step=plan.step,
        retire_rows=pack(plan.retired),
        admits=[_encode_admission(admission) for admission in plan.admitted],
        extend_rows=pack(row for row, _ in plan.extended),
        extend_blocks=pack(block for _, block in plan.extended),
        rows=pack(plan.rows),
        num_tokens=pack(plan.num_tokens),
        swap_out=_pack_all(plan.swapped_out),
        swap_in=_pack_all(plan.swapped_in),
        copies=_pack_all(plan.copied),
        forks=[worker_pb2.Fork(parent=parent, child=child, seed=seed) for parent, child, seed in plan.forked],
        told=_pack_all(plan.told),
        replaced=_pack_all(plan.replaced),
        branches=[worker_pb2.Fork(parent=parent, child=child, seed=seed) for parent, child, seed in plan.branched],
    )


def incarnation_suffix(incarnation: int) -> bytes:
    """What to append to an encoded plan to address it to one worker process."""
    return worker_pb2.StepPlan(incarnation=incarnation).SerializeToString()


def _encode_admission(admission: Admission) -> worker_pb2.Admit:
    return worker_pb2.Admit(
        row=admission.row,
        token_ids=pack(admission.token_ids),
        num_prompt_tokens=admission.num_prompt_tokens,
        num_computed_tokens=admission.num_computed,
        block_ids=pack(admission.block_ids),
        sampling=_encode_sampling(admission),
    )


def _encode_sampling(admission: Admission) -> worker_pb2.Sampling:
    params = admission.params
    return worker_pb2.Sampling(
        temperature=params.temperature if params.beam_width is None else 0.0,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=admission.seed,
        min_tokens=params.min_tokens,
        stop_token_ids=pack(sorted(admission.stop_token_ids)) if params.min_tokens else b"",
        bias_token_ids=pack(params.logit_bias.keys()),
        bias_values=pack_floats(params.logit_bias.values()),
        logprobs=admission.logprobs,
    )


def decode_report(report: worker_pb2.StepReport) -> StepResult:
    logprobs = {
        entry.position: Logprobs(unpack(entry.token_ids), unpack_floats(entry.values), entry.sampled_rank)
        for entry in report.logprobs
    }
    return StepResult(report.step, unpack(report.token_ids), logprobs)


# -- to and from clients


def decode_sampling(message: generation_pb2.SamplingParams) -> SamplingParams:
    """Raises InvalidRequest for a value out of range. What is absent takes its default; max_tokens: what fits."""
    given = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    given.setdefault("max_tokens", None)
    if message.early_stopping not in _EARLY_STOPPING:
        raise InvalidRequest(
            "early_stopping", f"there is no early_stopping {message.early_stopping}; see EarlyStopping"
        )
    return SamplingParams(
        **given,
        early_stopping=_EARLY_STOPPING[message.early_stopping],
        stop=message.stop,
        stop_token_ids=message.stop_token_ids,
        logit_bias=dict(message.logit_bias),
    )


def encode_logprobs(logprobs: Logprobs) -> generation_pb2.TokenLogprobs:
    candidates = [
        generation_pb2.TokenLogprob(token_id=token, logprob=value)
        for token, value in zip(logprobs.token_ids, logprobs.values, strict=True)
    ]
    return generation_pb2.TokenLogprobs(candidates=candidates, sampled_rank=logprobs.rank)


def encode_output(
    index: int, seq: int, token_ids: list[int], logprobs: list[Logprobs]
) -> generation_pb2.GenerateResponse:
    """Consecutive tokens of one sample in one message; `seq` is the position of the first."""
    output = generation_pb2.Output(index=index, seq=seq, token_ids=token_ids)
    if logprobs:
        output.logprobs.extend(map(encode_logprobs, logprobs))
    return generation_pb2.GenerateResponse(output=output)


def encode_finished(
    index: int,
    seq: int,
    reason: FinishReason,
    stop_token: int | None,
    cumulative_logprob: float | None = None,
    score: float | None = None,
) -> generation_pb2.GenerateResponse:
    """The end of a sample after `seq` tokens; the stop token is named where the request had named it."""
    finished = generation_pb2.Finished(
        index=index,
        seq=seq,
        reason=FINISH_REASONS[reason],
        stop_token_id=stop_token,
        cumulative_logprob=cumulative_logprob,
        score=score,
    )
    return generation_pb2.GenerateResponse(finished=finished)


def encode_load(counters: Counters, memory: MemoryUse, **gauges: int) -> generation_pb2.Load:
    """Counters and memory under their own names, which are the message's; `gauges`: its other fields."""
    fields = generation_pb2.Load.DESCRIPTOR.fields_by_name
    told = {name: getattr(source, name) for source in (counters, memory) for name in fields if hasattr(source, name)}
    return generation_pb2.Load(**told, **gauges)


_SUMS = tuple(name for name in Sums.__slots__ if name != "waited_s")
"""Under their own names, which are the message's."""


def encode_explanation(explanation: Explanation) -> generation_pb2.Explanation:
    sums = explanation.sums
    return generation_pb2.Explanation(
        request_id=explanation.request_id,
        state=explanation.state,
        age_s=explanation.age_s,
        moments=[generation_pb2.Moment(**moment._asdict()) for moment in explanation.moments],
        num_omitted=explanation.num_omitted,
        waits=[generation_pb2.Wait(reason=reason, seconds=seconds) for reason, seconds in sums.waited_s.items()],
        **{name: getattr(sums, name) for name in _SUMS},
    )


def decode_explanation(message: generation_pb2.Explanation) -> Explanation:
    """As it was, for who shows it."""
    waited = {wait.reason: wait.seconds for wait in message.waits}
    return Explanation(
        request_id=message.request_id,
        state=message.state,
        age_s=message.age_s,
        sums=Sums(waited_s=waited, **{name: getattr(message, name) for name in _SUMS}),
        moments=tuple(Moment(moment.at_s, moment.step, moment.kind, moment.text) for moment in message.moments),
        num_omitted=message.num_omitted,
    )


def encode_prefix(status: PrefixStatus) -> generation_pb2.ReservedPrefix:
    return generation_pb2.ReservedPrefix(**status._asdict())
