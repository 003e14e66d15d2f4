"""What the parts of a scheduler have in common. Each datum has one owner, which is named here once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from quire.scheduler.blocks import BlockPool
from quire.scheduler.config import SchedulerConfig
from quire.scheduler.draft import Changes
from quire.scheduler.explaining.journal import Event, Journal
from quire.scheduler.prefix_cache import PrefixCache
from quire.scheduler.progress import InProgress
from quire.scheduler.request import Request
from quire.scheduler.reserved import ReservedPrefixes
from quire.scheduler.running import RunningSet
from quire.scheduler.sequence import Sequence
from quire.scheduler.stats import Counters
from quire.scheduler.tables import BlockTables
from quire.scheduler.waiting import WaitingQueue


class State:
    def __init__(self, config: SchedulerConfig, tables: BlockTables | None, journal: Journal | None) -> None:
        self.config = config
        self.tables = tables or BlockTables(BlockPool(config.num_blocks), config.block_size, config.num_swap_blocks)
        self.pool = self.tables.pool
        self.cache = PrefixCache(self.pool, config.block_size, config.enable_prefix_caching)
        self.prefixes = ReservedPrefixes(self.cache, config.block_size)
        self.requests = InProgress()
        self.running = RunningSet(config.max_num_seqs)
        self.waiting = WaitingQueue()
        self.changes = Changes()
        """For the next plan."""
        self.counters = Counters()
        self.journal = journal

    def sequences(self) -> Iterator[Sequence]:
        """All that are in progress."""
        return chain.from_iterable(group.sequences for group in chain(self.running.groups, self.waiting))

    def note(self, request: Request, event: Event) -> None:
        if self.journal is not None:
            self.journal.note(self.running.decoding.clock.now + 1, request.request_id, event)
