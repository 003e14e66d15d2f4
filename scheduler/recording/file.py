"""The file of a recorded scheduler: everything that went in, and every decision that came out. Format 1.

    "quire recording 1\\n"
    chunk, chunk, …     each: size and CRC-32 of what follows (two uint32), then records, compressed by zlib
    record, record, …   each: kind (uint8), microseconds since the last (uint32), size (uint32), body

All little-endian. A chunk that was not written to its end, because the process was killed, is dropped. Bodies are JSON,
but for results, which are mostly tokens. Values are written by the fields of their dataclasses, and only where they
differ from the default: a field that is added later is recorded without a word here, and older files still read.
"""

from __future__ import annotations

import binascii
import enum
import json
import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quire.scheduler.config import SchedulerConfig
from quire.scheduler.params import SamplingParams
from quire.scheduler.plan import Admission, Logprobs, StepPlan, StepResult
from quire.scheduler.request import Request

MAGIC = b"quire recording 1\n"
CHUNK = struct.Struct("<II")
RECORD = struct.Struct("<BII")
MAX_CHUNK = 1 << 30

_RESULT = struct.Struct("<III")
_INT32 = "i"
_FLOAT64 = "d"
_LONG = 16
"""Lists of integers are packed from this length on."""

_CLASSES = {cls.__name__: cls for cls in (Request, SamplingParams, SchedulerConfig)}


class RecordingError(ValueError):
    """A file that cannot be read as a recording, in a sentence for the user."""


class Kind(enum.IntEnum):
    START = 1
    """{"quire": version, "config": SchedulerConfig}"""
    CALL = 2
    """{"call": method, "arguments": […], "outcome": …}"""
    PLAN = 3
    """`PlanWriter`"""
    NO_PLAN = 4
    """schedule() returned None."""
    RESULT = 5
    """`pack_result`, of what was given to apply()."""
    OUTCOME = 6
    """What apply() made of the result before, where it ended anybody."""
    FAILURE = 7
    """schedule(), or the apply() before, raised: the error. Nothing follows."""


class Record(NamedTuple):
    kind: Kind
    at_s: float
    """Seconds since the recording began."""
    body: bytes


# -- values


def dump(value: object) -> bytes:
    """As JSON. Dataclasses, sets, mappings and enums are understood."""
    return _ENCODER.encode(value).encode()


def load(body: bytes) -> Any:
    """What `dump` wrote; lists come back as tuples. Raises RecordingError for a class or a field that is not known."""
    return _restore(json.loads(body))


def _plain(value: object) -> object:
    """What the JSON encoder does not know by itself."""
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: {name: _packed(item) for name, item in _given(value)}}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(value)}
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"a {type(value).__name__} cannot be recorded: {value!r:.80}")


_ENCODER = json.JSONEncoder(default=_plain, separators=(",", ":"))


_DEFAULTS: dict[type, tuple[tuple[str, object], ...]] = {}


def _fields(cls: Any) -> tuple[tuple[str, object], ...]:
    if cls not in _DEFAULTS:
        _DEFAULTS[cls] = tuple((item.name, _default(item)) for item in fields(cls))
    return _DEFAULTS[cls]


def _default(item: Field[Any]) -> object:
    """A value that no field has where there is no default."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _given(value: object) -> Iterator[tuple[str, object]]:
    """The fields that are not at their default."""
    for name, default in _fields(type(value)):
        item = getattr(value, name)
        if item is not default and (item != default or type(item) is not type(default)):
            yield name, item


def _packed(item: object) -> object:
    if isinstance(item, Mapping):
        return {"map": list(item.items())}
    if isinstance(item, tuple) and len(item) >= _LONG:
        try:
            return {"ints": binascii.b2a_base64(array(_INT32, item).tobytes(), newline=False).decode()}
        except (TypeError, OverflowError):
            return item
    return item


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restore(item) for item in value)
    if not isinstance(value, dict) or len(value) != 1:
        return {name: _restore(item) for name, item in value.items()} if isinstance(value, dict) else value
    (name, inner), *_ = value.items()
    match name:
        case "set":
            return frozenset(_restore(inner))
        case "map":
            return dict(_restore(inner))
        case "ints":
            return _ints(binascii.a2b_base64(inner))
    if name not in _CLASSES:
        return {name: _restore(inner)}
    return _build(name, {key: _restore(item) for key, item in inner.items()})


def _build(name: str, values: dict[str, Any]) -> object:
    cls = _CLASSES[name]
    known = {item.name for item in fields(cls)}
    if unknown := sorted(values.keys() - known):
        raise RecordingError(
            f"the recording has {name}.{unknown[0]}, which is not known here: replay it with the version that made it"
        )
    return cls(**values)


def _ints(data: bytes) -> tuple[int, ...]:
    numbers = array(_INT32)
    numbers.frombytes(data)
    return tuple(numbers)


# -- plans


class PlanWriter:
    """Plans as the fields in which each differs from the one before: in a steady step, little but its number."""

    def __init__(self) -> None:
        first = StepPlan(0, (), (), (), (), (), 0)
        self._before = [getattr(first, name) for name in _PLAN_FIELDS]

    def dump(self, plan: StepPlan) -> bytes:
        """Equal for equal plans after equal plans."""
        differences: dict[str, object] = {}
        before = self._before
        for position, name in enumerate(_PLAN_FIELDS):
            value = getattr(plan, name)
            if value is not before[position] and value != before[position]:
                differences[name] = [_slim(item) for item in value] if name == "admitted" else value
            before[position] = value
        return dump(differences)


_PLAN_FIELDS = tuple(item.name for item in fields(StepPlan))
_ADMISSION_FIELDS = tuple(item.name for item in fields(Admission))


def _slim(admission: Admission) -> dict[str, object]:
    """What was decided, and a digest of what only repeats the request."""
    values = {name: getattr(admission, name) for name in _ADMISSION_FIELDS}
    tokens = array(_INT32, admission.token_ids)
    values["token_ids"] = [len(tokens), zlib.crc32(tokens.tobytes())]
    values["params"] = zlib.crc32(repr(admission.params).encode())
    values["stop_token_ids"] = zlib.crc32(repr(sorted(admission.stop_token_ids)).encode())
    return values


# -- results


def pack_result(result: StepResult) -> bytes:
    tokens = array(_INT32, result.token_ids).tobytes()
    if not result.logprobs:
        return _RESULT.pack(result.step, len(result.token_ids), 0) + tokens
    entries = result.logprobs.values()
    # Per entry: position, rank, number of tokens; then all tokens; then all values.
    heads = [
        number for position, entry in result.logprobs.items() for number in (position, entry.rank, len(entry.token_ids))
    ]
    candidates = [token for entry in entries for token in entry.token_ids]
    values = [value for entry in entries for value in entry.values]
    return b"".join(
        (
            _RESULT.pack(result.step, len(result.token_ids), len(result.logprobs)),
            tokens,
            array(_INT32, heads).tobytes(),
            array(_INT32, candidates).tobytes(),
            array(_FLOAT64, values).tobytes(),
        )
    )


def unpack_result(body: bytes) -> StepResult:
    step, num_tokens, num_entries = _RESULT.unpack_from(body)
    at = _RESULT.size
    token_ids = _ints(body[at : at + 4 * num_tokens])
    at += 4 * num_tokens
    heads = _ints(body[at : at + 12 * num_entries])
    at += 12 * num_entries
    total = sum(heads[2::3])
    candidates = _ints(body[at : at + 4 * total])
    values = array(_FLOAT64)
    values.frombytes(body[at + 4 * total :])
    logprobs, first = {}, 0
    for position, rank, count in zip(heads[::3], heads[1::3], heads[2::3], strict=True):
        part = slice(first, first + count)
        logprobs[position] = Logprobs(candidates[part], tuple(values[part]), rank)
        first += count
    return StepResult(step, token_ids, logprobs)


# -- the file


def read(path: str | Path) -> Iterator[Record]:
    """Every record of every whole chunk. Raises RecordingError for a file that is none, or is broken before its end."""
    try:
        file = open(path, "rb")  # noqa: SIM115  (closed below, whenever reading ends)
    except OSError as error:
        raise RecordingError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        magic = file.read(len(MAGIC))
        if magic != MAGIC:
            raise RecordingError(f"{path} is no recording: give a file that `quire serve --record` has written")
        micros = 0
        for records in _chunks(file, path):
            at = 0
            while at < len(records):
                kind, delta, size = RECORD.unpack_from(records, at)
                at += RECORD.size
                micros += delta
                yield Record(Kind(kind), micros / 1e6, records[at : at + size])
                at += size


def _chunks(file: Any, path: str | Path) -> Iterator[bytes]:
    while len(head := file.read(CHUNK.size)) == CHUNK.size:
        size, checksum = CHUNK.unpack(head)
        start = file.tell()
        data = file.read(size) if size <= MAX_CHUNK else b""
        if not data or zlib.crc32(data) != checksum:
            if not file.peek(1):
                return  # its writer was killed
            raise RecordingError(f"{path} is damaged at byte {start}: what follows cannot be replayed")
        yield zlib.decompress(data)
