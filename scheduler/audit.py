"""Whether the scheduler's books balance: every invariant, by a walk over everything. O(pool)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.scheduler.blocks import AuditError
from quire.scheduler.groups import Group
from quire.scheduler.sequence import Sequence, Status

if TYPE_CHECKING:
    from quire.scheduler.scheduler import Scheduler


def audit_scheduler(scheduler: Scheduler) -> None:
    """Raises AuditError."""
    sequences = list(scheduler.sequences())
    kept = [block for s in sequences if s.join is not None for block in s.join.block_ids]
    scheduler.tables.audit([*sequences, *scheduler.prefixes.ready], kept)
    for sequence in sequences:
        _audit_sequence(sequence)
    for group in (*scheduler.groups, *scheduler.waiting):
        _audit_group(group)
    _audit_order(scheduler)
    _audit_rows(scheduler)
    scheduler._decoding.audit([s for s in scheduler.running if s.group.search is None and not s.group.is_led])
    prefilling = [s for s in scheduler.running if s.gap > 1 or s.group.is_led or _is_unread_beam(scheduler, s)]
    if scheduler._prefilling != prefilling:
        raise AuditError(f"{scheduler._prefilling} are not the running sequences with chunks to compute: {prefilling}")
    joining = [group for group in scheduler.groups if group.has_joining]
    if not set(joining) <= set(scheduler._joining):
        raise AuditError(f"{joining} have sequences that wait for siblings")
    scheduler._stops.audit(held[0].request.stop_token_ids for held in scheduler._requests.values())
    _audit_memory(scheduler)


def _is_unread_beam(scheduler: Scheduler, sequence: Sequence) -> bool:
    """A beam with one known token to compute that no plan has taken up and no search has chosen in this step."""
    group = sequence.group
    return group.search is not None and sequence.num_in_flight == 0 and group not in scheduler._searched


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


def _audit_order(scheduler: Scheduler) -> None:
    for sequence in (scheduler.running, [*scheduler.groups], [*scheduler.waiting]):
        arrivals = [item.arrival for item in sequence]
        if arrivals != sorted(set(arrivals)):
            raise AuditError(f"{sequence} are not in order of arrival")
    in_groups = {id(s) for group in scheduler.groups for s in group.sequences if s.status is Status.RUNNING}
    if in_groups != {id(sequence) for sequence in scheduler.running}:
        raise AuditError("the running sequences are not those of the running groups")
    held = {id(sequence) for sequences in scheduler._requests.values() for sequence in sequences}
    if held != {id(sequence) for sequence in scheduler.sequences()}:
        raise AuditError("the requests and the groups do not hold the same sequences")
    if scheduler.num_waiting != sum(group.num_rows for group in scheduler.waiting):
        raise AuditError(f"{scheduler.num_waiting} sequences wait by the count, not by the queue")


def _audit_rows(scheduler: Scheduler) -> None:
    rows = [sequence.row for sequence in scheduler.running]
    if sorted(rows + scheduler._free_rows) != list(range(scheduler.config.max_num_seqs)):
        raise AuditError(f"rows {sorted(rows)} in use and {sorted(scheduler._free_rows)} free do not make up the table")
    promised = sum(group.num_promised for group in scheduler.groups)
    if promised != scheduler._num_promised or promised > len(scheduler._free_rows):
        raise AuditError(
            f"{scheduler._num_promised} of {len(scheduler._free_rows)} free rows are promised, {promised} by groups"
        )


def _audit_memory(scheduler: Scheduler) -> None:
    memory = scheduler.memory()
    total = memory.blocks_free + memory.blocks_cached + memory.blocks_used
    slots = memory.slots_filled + memory.slots_reserved
    if total != memory.blocks_total or slots != memory.blocks_used * scheduler.config.block_size or min(memory) < 0:
        raise AuditError(f"memory does not add up: {memory}")
    if memory.blocks_reserved_prefix != scheduler.prefixes.count_blocks():
        raise AuditError(f"reserved prefixes keep {scheduler.prefixes.count_blocks()} blocks: {memory}")
