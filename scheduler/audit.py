"""Whether the scheduler's books balance: every invariant, by a walk over everything. O(pool)."""

from __future__ import annotations

from quire.scheduler.blocks import AuditError
from quire.scheduler.groups import Group
from quire.scheduler.sequence import Sequence, Status
from quire.scheduler.state import State
from quire.scheduler.stats import MemoryUse


def audit_state(state: State, memory: MemoryUse) -> None:
    """Raises AuditError."""
    sequences = list(state.sequences())
    kept = [block for s in sequences if s.join is not None for block in s.join.block_ids]
    state.tables.audit([*sequences, *state.prefixes.ready], kept)
    for sequence in sequences:
        _audit_sequence(sequence)
    for group in (*state.running.groups, *state.waiting):
        _audit_group(group)
    state.running.audit()
    state.waiting.audit()
    state.requests.audit(sequences)
    _audit_memory(state, memory)


def _audit_sequence(sequence: Sequence) -> None:
    running = sequence.status is Status.RUNNING
    if running != (sequence.row >= 0) or sequence.status is Status.FINISHED:
        raise AuditError(f"{sequence} is {sequence.status} with row {sequence.row}")
    if not running and sequence.block_ids:
        raise AuditError(f"{sequence} waits but owns blocks")
    if not running and bool(sequence.num_computed) != bool(sequence.swap_ids):
        raise AuditError(f"{sequence} waits with {sequence.num_computed} computed tokens and {sequence.swap_ids}")
    if running and sequence.swap_ids:
        raise AuditError(f"{sequence} runs and holds slots of the swap space")
    if not 0 <= sequence.num_computed <= sequence.num_tokens or sequence.num_in_flight < 0:
        raise AuditError(f"{sequence} has impossible numbers")
    if running and sequence.num_computed > sequence.capacity:
        raise AuditError(f"{sequence} has {sequence.num_computed} computed tokens in {sequence.capacity} slots")


def _audit_group(group: Group) -> None:
    allowed = {Status.RUNNING, Status.PENDING} if group.is_running else {Status.WAITING}
    if not group.sequences or not all(s.status in allowed and s.group is group for s in group.sequences):
        raise AuditError(f"{group} has {group.sequences}")
    if group.is_swapped != any(s.swap_ids for s in group.sequences):
        raise AuditError(f"{group} and its sequences do not agree on where its blocks are")
    wanted = group.num_rows - group.num_held if group.is_running else 0
    if group.num_promised != wanted:
        raise AuditError(f"{group} was promised {group.num_promised} rows, and has {wanted} to take")


def _audit_memory(state: State, memory: MemoryUse) -> None:
    total = memory.blocks_free + memory.blocks_cached + memory.blocks_used
    slots = memory.slots_filled + memory.slots_reserved
    if total != memory.blocks_total or slots != memory.blocks_used * state.config.block_size or min(memory) < 0:
        raise AuditError(f"memory does not add up: {memory}")
    if memory.blocks_reserved_prefix != state.prefixes.count_blocks():
        raise AuditError(f"reserved prefixes keep {state.prefixes.count_blocks()} blocks: {memory}")
