"""What `quire replay` and `quire explain` print. Replaying needs the standard library alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quire.cluster.config import ConfigError
from quire.scheduler.recording.file import RecordingError
from quire.scheduler.recording.replay import Replay, replay
from quire.scheduler.recording.rerun import compare

if TYPE_CHECKING:
    from quire.protos import generation_pb2 as pb


def replay_lines(file: str, settings: Sequence[str], request_id: str | None) -> tuple[list[str], int]:
    """The report, and the exit code: 1 where the scheduler of now decides otherwise with the settings of then.

    `settings`: NAME=VALUE. `request_id`: tell this request's life instead. Raises ConfigError."""
    try:
        changes = dict(map(_split, settings))
        if request_id is not None:
            return _life(file, request_id)
        if changes:
            return _compared(file, changes)
        followed = replay(file)
        return _followed(file, followed), 0 if followed.difference is None else 1
    except (RecordingError, ValueError) as error:
        raise ConfigError(str(error)) from error


def explanation_lines(message: pb.Explanation) -> list[str]:
    from quire.cluster import wire

    return wire.decode_explanation(message).lines()


def _split(setting: str) -> tuple[str, str]:
    name, sign, value = setting.partition("=")
    if not sign:
        raise ConfigError(f"--set takes NAME=VALUE, such as watermark=0.05, not {setting!r}")
    return name.strip().replace("-", "_"), value.strip()


def _life(file: str, request_id: str) -> tuple[list[str], int]:
    followed = replay(file, explain=True)
    assert followed.lives is not None
    found = followed.lives.explain(request_id)
    lines = [] if found is None else found.lines()
    if followed.difference is not None:
        return [*lines, "from here on the scheduler decides otherwise than it did:", *followed.difference.lines()], 1
    if found is None:
        raise ConfigError(f"the recording has no request {request_id!r}")
    return lines, 0


def _compared(file: str, changes: dict[str, str]) -> tuple[list[str], int]:
    comparison = compare(file, changes)
    lines = _followed(file, comparison.recorded)
    if comparison.recorded.difference is not None:
        more = "with the settings of then it decides otherwise already: replay with the version that made the recording"
        return [*lines, more], 1
    given = ", ".join(f"{name}={value}" for name, value in changes.items())
    if comparison.difference is None:
        return [*lines, f"with {given}: every decision is the same too"], 0
    return [*lines, f"with {given}:", *comparison.difference.lines(), *comparison.lines()], 0


def _followed(file: str, followed: Replay) -> list[str]:
    summary = (
        f"{file}: {followed.num_plans:,} steps in {followed.duration_s:.1f} s, recorded by quire {followed.version}"
    )
    if followed.difference is None:
        return [f"{summary}: every decision is the same"]
    return [summary, *followed.difference.lines()]
