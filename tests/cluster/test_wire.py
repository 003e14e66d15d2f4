"""The scheduler's values as messages, and back."""

from __future__ import annotations

import pytest

from quire.cluster import wire
from quire.protos import generation_pb2 as pb
from quire.scheduler.params import InvalidRequest, SamplingParams
from quire.scheduler.reserved import PrefixStatus
from quire.scheduler.stats import Counters, MemoryUse


def test_what_a_client_leaves_out_takes_its_default() -> None:
    assert wire.decode_sampling(pb.SamplingParams()) == SamplingParams(max_tokens=None)


def test_ranked_answers_on_the_wire() -> None:
    best = wire.decode_sampling(pb.SamplingParams(n=2, best_of=5))
    assert (best.n, best.best_of, best.is_ranked, best.num_sequences) == (2, 5, True, 5)
    beams = wire.decode_sampling(pb.SamplingParams(n=2, beam_width=4, length_penalty=0.6))
    # All of a Python float: a penalty rounded to 32 bits would rank close answers differently.
    assert (beams.beam_width, beams.length_penalty, beams.early_stopping) == (4, 0.6, False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (pb.EARLY_STOPPING_UNSPECIFIED, False),
        (pb.EARLY_STOPPING_FALSE, False),
        (pb.EARLY_STOPPING_TRUE, True),
        (pb.EARLY_STOPPING_NEVER, "never"),
    ],
)
def test_early_stopping(given: pb.EarlyStopping, expected: bool | str) -> None:
    assert wire.decode_sampling(pb.SamplingParams(beam_width=2, early_stopping=given)).early_stopping == expected


def test_an_early_stopping_of_a_later_version_is_refused() -> None:
    message = pb.SamplingParams.FromString(pb.SamplingParams(early_stopping=77).SerializeToString())
    with pytest.raises(InvalidRequest, match="no early_stopping 77") as caught:
        wire.decode_sampling(message)
    assert caught.value.field == "early_stopping"


def test_every_number_of_a_load_is_somebodys() -> None:
    """A counter that is renamed is missed here, and not by an operator."""
    gauges = ("num_running", "num_waiting", "open_requests", "block_size", "block_bytes")
    counters, memory = Counters(), MemoryUse(*range(1, len(MemoryUse._fields) + 1))
    for number, name in enumerate(Counters.__slots__, start=100):
        setattr(counters, name, number)
    load = wire.encode_load(counters, memory, **{name: 1000 + i for i, name in enumerate(gauges)})
    values = {field.name: value for field, value in load.ListFields()}
    assert set(values) == set(pb.Load.DESCRIPTOR.fields_by_name)
    assert (values["blocks_total"], values["num_steps"], values["block_bytes"]) == (1, 100, 1004)
    assert values["swapped_in_blocks"] == counters.swapped_in_blocks and values["slots_shared"] == memory.slots_shared


def test_a_reserved_prefix() -> None:
    encoded = wire.encode_prefix(PrefixStatus("system", 33, 3, True, 12))
    assert encoded == pb.ReservedPrefix(name="system", num_tokens=33, num_blocks=3, is_ready=True, num_hits=12)
