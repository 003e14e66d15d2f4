"""What the scheduler tells (journal.py), in words."""

from __future__ import annotations

from quire.scheduler.explaining.journal import (
    Added,
    Admitted,
    Blocked,
    Branched,
    Cancelled,
    Chunk,
    Copied,
    Discarded,
    Ended,
    Event,
    Finished,
    Forked,
    Preempted,
    Resumed,
)


def in_words(request_id: str, event: Event, with_names: bool = True) -> str:
    """One line about something that happened to the request. [i] stands for its sequence i."""
    match event:
        case Added(tokens, sequences, waiting):
            samples = "" if sequences == 1 else f", {sequences} sequences"
            return f"arrived: {count(tokens, 'prompt token')}{samples}, {count(waiting, 'request')} before it"
        case Blocked(wait, needed, available):
            numbers = f": needs {needed}, there are {available}" if needed else ""
            return f"first in the queue, waits for {wait.value}{numbers}"
        case Admitted(tokens, cached, blocks):
            found = f", {cached} of them found in the cache" if cached else ""
            return f"let in with {count(tokens, 'token')}{found}; it has {count(blocks, 'block')}"
        case Preempted():
            return _preempted(request_id, event, with_names)
        case Resumed(blocks, tokens):
            return f"back from the swap space: {count(blocks, 'block')}, {count(tokens, 'token')}"
        case Ended():
            return "over: its memory is free"
        case _:
            return _of_a_sequence(event)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def seconds_text(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def _preempted(request_id: str, event: Preempted, with_names: bool) -> str:
    other = event.by if with_names else "an earlier one"
    by = "as the latest, for itself" if event.by == request_id else f"for {other}"
    how = "swapped out" if event.mode == "swap" else "its tokens are to be computed again"
    given = f"{count(event.num_blocks, 'block')}, {count(event.num_tokens, 'token')}"
    costs = (("swap", event.swap_s), ("recompute", event.recompute_s))
    known = ", ".join(f"{mode} {seconds_text(cost)}" for mode, cost in costs if cost)
    estimated = f" (estimated cost: {known})" if known else ""
    return f"preempted {by}, {how}: gives up {given}{estimated}"


def _of_a_sequence(event: Event) -> str:
    match event:
        case Chunk(sample, tokens):
            return f"[{sample}] computes {count(tokens, 'known token')}"
        case Branched(parent, child):
            return f"[{child}] begins, from the prompt that [{parent}] has computed"
        case Forked(parent, child):
            return f"[{child}] becomes another continuation of [{parent}]"
        case Copied(sample, source, destination):
            return f"[{sample}] gets a copy of a shared block: {source} to {destination}"
        case Discarded(sample, tokens):
            return f"[{sample}] had ended: {count(tokens, 'token')} computed ahead in vain"
        case Finished(sample, reason, tokens):
            return f"[{sample}] ends after {count(tokens, 'token')}: {reason.value}"
        case Cancelled(sample, tokens):
            return f"[{sample}] is cancelled after {count(tokens, 'token')}"
    raise TypeError(f"there are no words for {event}")
