"""How many tokens a step may compute: its budget, and the part of it that is left to prompts while others decode.

A chunk of a prompt holds up every sequence that decodes in the same step. Where computing is what takes time, and not
reading weights, a step that is full of prompts takes many times as long as one without, and whoever reads along sees
the text stop. With a `prefill_floor`, prompts get no more of a step, beyond a token each, than the largest of:

- the floor, so that a prompt that comes alone makes progress in every step;
- DECODES times the sequences that decode: the more there are, the more end and make room in every step, and the more
  prompts must be computed to keep the places filled;
- a share of the prompts that wait: a load of prompts that decoding cannot keep up with gets ever more of each step, up
  to all of it.
"""

from __future__ import annotations

from quire.scheduler.state import State

DECODES = 8
"""Tokens of prompts beside each sequence that decodes."""

BACKLOG = 8
"""Steps over which what waits is spread."""


def spare_tokens(state: State) -> int:
    """Tokens of the next step beyond one for each running sequence."""
    config, running = state.config, state.running
    spare = config.max_num_batched_tokens - len(running.sequences)
    num_decodes = len(running.decoding.rows)
    if not config.prefill_floor or not num_decodes:
        return spare
    backlog = sum(sequence.gap for sequence in running.prefilling) + state.waiting.num_tokens
    limit = max(config.prefill_floor, DECODES * num_decodes, backlog // BACKLOG)
    if state.waiting:  # who comes back from the swap space decodes at once, all together
        limit = max(limit, state.waiting.first.num_rows)
    return min(spare, limit)
