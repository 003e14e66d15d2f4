"""A recorded run, followed again: equal to the last decision, or told where not."""

import contextlib
import dataclasses
import random
import re
import struct
import zlib

import pytest
from fake_worker import VOCAB, FakeWorker
from schedulers import make_request

from quire.scheduler.blocks import AuditError
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.engine import Engine
from quire.scheduler.params import InvalidRequest, QueueFull, SamplingParams
from quire.scheduler.plan import Admission, Logprobs, StepPlan, StepResult
from quire.scheduler.recording import file, record
from quire.scheduler.recording.file import (
    Kind,
    PlanWriter,
    RecordingError,
    dump,
    load,
    pack_result,
    read,
    unpack_result,
)
from quire.scheduler.recording.record import Recorder, RecordingScheduler
from quire.scheduler.recording.replay import Watcher, changed, replay
from quire.scheduler.recording.rerun import _Past, _Rerun, compare
from quire.scheduler.request import ModelLimits, Request
from quire.scheduler.scheduler import Scheduler

CONFIG = SchedulerConfig(
    num_blocks=20, block_size=4, max_model_len=40, max_num_seqs=6, max_num_batched_tokens=16, max_num_waiting=6,
    watermark=0.1, num_swap_blocks=8, block_bytes=1 << 20, link_bytes_per_s=6e8, prefill_tokens_per_s=1000.0,
)  # fmt: skip
COVERED = {"num_swap_preemptions", "recomputed_tokens", "copied_blocks", "swapped_in_blocks", "discarded_tokens"}
DECODING = ({"n": 2}, {"n": 3}, {"best_of": 3}, {"beam_width": 2}, {"beam_width": 4, "n": 2}, {"logprobs": 2})


def _record(path, run_ahead=0, seed=0, config=CONFIG, num_requests=80):
    """A life with everything that can happen to a scheduler; returns its counters."""
    rng = random.Random(seed)
    recorder = Recorder(path)
    scheduler = RecordingScheduler(config, recorder)
    worker = FakeWorker(
        config.num_blocks, config.block_size, config.max_num_seqs, config.max_num_batched_tokens, config.num_swap_blocks
    )
    engine = Engine(scheduler, worker, run_ahead)
    to_add, refused = num_requests, 0
    while to_add or scheduler.has_work:
        while to_add and rng.random() < 0.4:
            to_add -= 1
            begin = [rng.choice([1, 2])] * rng.choice([0, 4, 9])
            prompt = begin + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
            decoding = rng.choice([{}, {}, {}, *DECODING])
            temperature = 1 if "beam_width" in decoding else rng.choice([0, 0.7, 1])
            request = make_request(
                f"r{rng.randrange(10)}", prompt, config.max_model_len, seed=rng.randrange(1 << 60),
                eos=(rng.randrange(VOCAB),), temperature=temperature, logit_bias={3: 1.5, 9: -2.0},
                stop_token_ids=[5], max_tokens=rng.randint(1, 40 - len(prompt)), **decoding,
            )  # fmt: skip
            try:
                scheduler.add(request)
            except (QueueFull, InvalidRequest):  # its id is in use, or the queue is full
                refused += 1
        if rng.random() < 0.1:
            scheduler.cancel(f"r{rng.randrange(10)}", rng.choice([None, 0, 1]))
        if rng.random() < 0.02:
            _reserve(scheduler, rng)
        engine.step()
    recorder.close()
    counters = scheduler.counters
    assert refused > 0 and counters.num_cancelled > 0 and counters.prefix_hit_tokens > 0
    assert counters.num_preemptions > 0
    return counters


def _reserve(scheduler, rng):
    """Tokens with which some prompts begin; refused where too much is reserved."""
    if not scheduler.release_prefix(rng.choice("pq")):
        with contextlib.suppress(InvalidRequest):
            scheduler.reserve_prefix(rng.choice("pq"), [rng.choice([1, 2])] * rng.choice([3, 4, 9]))


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_a_recorded_run_replays_without_a_difference(tmp_path, run_ahead):
    kinds = set()
    for seed in range(10):
        counters = _record(tmp_path / "run", run_ahead, seed)
        kinds |= {name for name in COVERED if getattr(counters, name)}
        replayed = replay(tmp_path / "run")
        assert replayed.difference is None
        assert replayed.scheduler.counters == counters
        assert replayed.num_plans == counters.num_steps and replayed.num_ahead == run_ahead
        assert not replayed.scheduler.has_work
        replayed.scheduler.audit()
    assert kinds == COVERED - ({"discarded_tokens"} if not run_ahead else set())


def test_a_scheduler_that_decides_otherwise_is_caught(tmp_path, monkeypatch):
    _record(tmp_path / "run")
    allocate = Scheduler.__init__

    def with_one_block_taken(self, config, **options):
        allocate(self, config, **options)
        self.pool.allocate()

    monkeypatch.setattr(Scheduler, "__init__", with_one_block_taken)
    difference = replay(tmp_path / "run").difference
    assert difference.step == 1 and difference.what == "the plan's 'admitted'"
    assert '"block_ids": [0,' in difference.then and '"block_ids": [1,' in difference.now
    assert re.match(r"first difference in step 1, \d+\.\d{3} s into the recording: ", difference.lines()[0])


def test_a_difference_in_what_ends_is_caught(tmp_path, monkeypatch):
    _record(tmp_path / "run")
    monkeypatch.setattr(record, "outcome_of", lambda events: {})
    _record(tmp_path / "mute")
    difference = replay(tmp_path / "mute").difference
    assert difference.what == "what the step's result ended" and difference.then == "nothing"
    assert '"ends"' in difference.now


def test_a_changed_policy_is_shown_at_its_first_decision(tmp_path):
    counters = _record(tmp_path / "run", run_ahead=1)
    comparison = compare(tmp_path / "run", {"max_num_batched_tokens": "12"})
    assert comparison.recorded.difference is None
    assert comparison.difference.what == "the plan's 'num_tokens'"
    assert comparison.then == counters != comparison.now
    assert comparison.now.num_finished == counters.num_finished
    assert comparison.now.generation_tokens == counters.generation_tokens
    lines = {line.split()[0]: line.split()[1:] for line in comparison.lines()[1:]}
    assert lines["num_steps"] == [str(counters.num_steps), str(comparison.now.num_steps)]
    assert "num_finished" not in lines


def test_more_memory_would_have_preempted_nobody(tmp_path):
    for seed in range(5):
        counters = _record(tmp_path / "run", 2, seed)
        comparison = compare(tmp_path / "run", {"num_blocks": "200"})
        assert comparison.now.num_preemptions == 0 == comparison.now.recomputed_tokens
        # Whoever ended by itself ends with the same tokens; cancelled ones with as many as they had.
        assert comparison.now.generation_tokens >= counters.generation_tokens
        assert comparison.now.num_finished >= counters.num_finished


def test_a_change_without_effect_is_no_difference(tmp_path):
    counters = _record(tmp_path / "run")
    comparison = compare(tmp_path / "run", {"max_model_len": "39"})
    assert comparison.difference is None and comparison.now == counters
    assert comparison.lines() == ["all sums are the same"]


def test_the_same_policy_run_again_from_its_tokens_does_the_same_work(tmp_path):
    """What rerun.py makes of a recording is measured on one whose answer is known."""
    for run_ahead in (0, 2):
        counters = _record(tmp_path / "run", run_ahead)
        past = _Past()
        followed = replay(tmp_path / "run", watcher=Watcher(past.note_call, past.note_result))
        config = dataclasses.replace(followed.scheduler.config, max_num_waiting=100)
        rerun = _Rerun(past, Scheduler(config), run_ahead)
        rerun.run()
        assert rerun.scheduler.counters == counters


def test_a_failure_is_recorded_and_happens_again(tmp_path):
    recorder = Recorder(tmp_path / "run")
    scheduler = RecordingScheduler(CONFIG, recorder)
    scheduler.add(make_request("r", [1, 2, 3]))
    plan = scheduler.schedule()
    with pytest.raises(AuditError):
        scheduler.apply(StepResult(plan.step + 1, (4,), {}))
    recorder.close()
    assert replay(tmp_path / "run").difference is None
    assert [entry.kind for entry in read(tmp_path / "run")][-1] is Kind.FAILURE


# -- the file


def _cut_into_chunks(path, size):
    """The same records, as if the disk had been given to them in small pieces."""
    chunk = file.CHUNK
    data, at, records = path.read_bytes(), len(file.MAGIC), b""
    while at < len(data):
        length, _ = chunk.unpack_from(data, at)
        records += zlib.decompress(data[at + chunk.size : at + chunk.size + length])
        at += chunk.size + length
    pieces, start, end = [], 0, 0
    while end < len(records):
        end += file.RECORD.size + file.RECORD.unpack_from(records, end)[2]
        if end - start >= size or end == len(records):
            pieces.append(zlib.compress(records[start:end]))
            start = end
    path.write_bytes(file.MAGIC + b"".join(chunk.pack(len(piece), zlib.crc32(piece)) + piece for piece in pieces))


def test_a_file_cut_anywhere_is_read_to_its_last_whole_chunk(tmp_path):
    _record(tmp_path / "run")
    _cut_into_chunks(tmp_path / "run", 1000)
    data = (tmp_path / "run").read_bytes()
    whole = list(read(tmp_path / "run"))
    rng = random.Random(1)
    counts = set()
    for _ in range(30):
        size = rng.randrange(len(file.MAGIC), len(data))
        (tmp_path / "cut").write_bytes(data[:size])
        records = list(read(tmp_path / "cut"))
        assert records == whole[: len(records)] and len(records) < len(whole)
        counts.add(len(records))
        if records:
            assert replay(tmp_path / "cut").difference is None
    assert len(counts) > 10


def test_what_is_no_recording_is_told(tmp_path):
    with pytest.raises(RecordingError, match="cannot be read: No such file"):
        replay(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(RecordingError, match="is no recording: give a file that `quire serve --record` has written"):
        replay(tmp_path / "text")
    (tmp_path / "empty").write_bytes(file.MAGIC)
    with pytest.raises(RecordingError, match="nothing was recorded"):
        replay(tmp_path / "empty")


def test_damage_in_the_middle_is_told(tmp_path):
    _record(tmp_path / "run")
    _cut_into_chunks(tmp_path / "run", 1000)
    data = bytearray((tmp_path / "run").read_bytes())
    first = len(file.MAGIC)
    for change in (slice(first + 13, first + 14), slice(first, first + 8), slice(first + 3, first + 4)):
        broken = data.copy()
        broken[change] = bytes(len(broken[change])) if change.start == first else b"\xff"
        (tmp_path / "run").write_bytes(broken)
        with pytest.raises(RecordingError, match="is damaged at byte 26"):
            replay(tmp_path / "run")


def test_a_field_of_a_later_version_is_told(tmp_path):
    recorder = Recorder(tmp_path / "run")
    body = dump({"quire": "9", "config": CONFIG}).replace(b'"num_blocks"', b'"num_bricks"')
    recorder.write(Kind.START, body)
    recorder.close()
    with pytest.raises(RecordingError, match=r"SchedulerConfig\.num_bricks, which is not known here"):
        replay(tmp_path / "run")


def test_a_disk_that_fails_ends_the_recording_and_nothing_else(tmp_path, monkeypatch, caplog):
    def fail():
        raise OSError(28, "No space left on device")

    recorder = Recorder(tmp_path / "run")
    monkeypatch.setattr(recorder, "_flush", fail)
    scheduler = RecordingScheduler(CONFIG, recorder)
    recorder._thread.join(10)
    assert f"recording to {tmp_path / 'run'} has ended: [Errno 28] No space left" in caplog.text
    scheduler.add(make_request("r", [1, 2, 3]))
    assert scheduler.schedule() is not None and not recorder._pending
    recorder.close()


def test_what_comes_while_the_file_is_being_written_is_in_it(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path / "run")
    flush, late = recorder._flush, [Kind.PLAN]

    def flush_and_write():
        flush()
        if late:
            recorder.write(late.pop())

    monkeypatch.setattr(recorder, "_flush", flush_and_write)
    recorder.write(Kind.NO_PLAN)
    recorder.close()
    assert [entry.kind for entry in read(tmp_path / "run")] == [Kind.NO_PLAN, Kind.PLAN]


def test_times_are_kept(tmp_path):
    now = [10**9]
    recorder = Recorder(tmp_path / "run", lambda: now[0])
    for wait in (0, 1500, 1500, 3 * 10**12):
        now[0] += wait
        recorder.write(Kind.NO_PLAN)
    recorder.close()
    assert [entry.at_s for entry in read(tmp_path / "run")] == pytest.approx([0, 1e-6, 3e-6, 3000.000003], abs=1e-9)


# -- values


def test_requests_come_back_as_they_were():
    request = Request.checked(
        "né\n", range(500), SamplingParams(
            n=2, best_of=4, max_tokens=None, temperature=0.25, logit_bias={7: -1.5, 2: 1e-3}, stop=["a", "b"],
            stop_token_ids=list(range(40)), logprobs=3, seed=-5, early_stopping="never",
        ), 1 << 63, ModelLimits(1000, 2000, (999, 3)), cache_salt="tenant",
    )  # fmt: skip
    for value in (request, make_request("x", [1]), CONFIG, dataclasses.replace(CONFIG, link_bytes_per_s=1 / 3)):
        back = load(dump(value))
        assert back == value and repr(back) == repr(value)


def test_results_come_back_as_they_were():
    logprobs = {2: Logprobs((4, 9, 4), (-0.1, -1e-9, float("-inf")), 2), 0: Logprobs((1,), (-3.3,), 1)}
    for result in (StepResult(7, (), {}), StepResult(7, (5, -1, 4), {}), StepResult(7, (5, -1, 4), logprobs)):
        assert unpack_result(pack_result(result)) == result


def test_a_result_has_no_field_that_is_not_written():
    """`pack_result` names them: a field that is added must be added there."""
    assert [field.name for field in dataclasses.fields(StepResult)] == ["step", "token_ids", "logprobs"]
    assert Logprobs._fields == ("token_ids", "values", "rank")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(StepPlan)])
def test_every_field_of_a_plan_is_written(field):
    values = {
        "step": 9, "num_sampled": 4, "extended": ((1, 2),), "num_tokens": (3,), "retired": (2,), "rows": (1,),
        "admitted": (Admission(0, (1, 2), 2, 0, (5,), SamplingParams(), 3, frozenset({1})),),
    }  # fmt: skip
    plan = StepPlan(1, (), (), (), (), (), 0)
    other = dataclasses.replace(plan, **{field: values.get(field, ((1, 2, 3),))})
    assert PlanWriter().dump(plan) != PlanWriter().dump(other)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Admission)])
def test_every_field_of_an_admission_is_in_its_digest(field):
    values = {
        "token_ids": (1, 3), "block_ids": (6,), "params": SamplingParams(top_k=3), "stop_token_ids": frozenset({2}),
    }  # fmt: skip
    admission = Admission(0, (1, 2), 2, 0, (5,), SamplingParams(), 3, frozenset({1}), None)
    other = dataclasses.replace(admission, **{field: values.get(field, 17)})
    one, two = (StepPlan(1, (), (item,), (), (), (), 0) for item in (admission, other))
    assert PlanWriter().dump(one) != PlanWriter().dump(two)


def test_steady_steps_take_little_room():
    writer = PlanWriter()
    rows = tuple(range(256))
    sizes = [len(writer.dump(StepPlan(step, (), (), (), rows, (), 256))) for step in range(1, 4)]
    assert sizes[1:] == [len(b'{"step":2}')] * 2


def test_settings_given_as_text():
    config = changed(CONFIG, {"watermark": "0.5", "num_blocks": "32", "enable_prefix_caching": "false"})
    assert (config.watermark, config.num_blocks, config.enable_prefix_caching) == (0.5, 32, False)
    for changes, sentence in (
        ({"blocks": "3"}, "there is no setting 'blocks': give one of num_blocks, "),
        ({"watermark": "high"}, "watermark takes a number, not 'high'"),
        ({"enable_prefix_caching": "1"}, "enable_prefix_caching is true or false, not '1'"),
        ({"watermark": "2"}, r"watermark must be in \[0, 1\), not 2.0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            changed(CONFIG, changes)


def test_the_format_is_what_it_says(tmp_path):
    recorder = Recorder(tmp_path / "run", lambda: 0)
    recorder.write(Kind.CALL, b"{}")
    recorder.close()
    data = (tmp_path / "run").read_bytes()
    assert data.startswith(b"quire recording 1\n")
    size, checksum = struct.unpack_from("<II", data, 18)
    assert len(data) == 26 + size and zlib.crc32(data[26:]) == checksum
    assert zlib.decompress(data[26:]) == struct.pack("<BII", 2, 0, 2) + b"{}"
