"""Steps over one table and one pool: from a plan to results on their way to the host, without a wait for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from quire.kernels.attention import SharedPrefixes
from quire.kernels.step_inputs import store_tokens
from quire.protos import worker_pb2
from quire.worker.batch import Batch, Parcel, StepInputs, find_shared
from quire.worker.graphs import DecodeGraphs, Recorder
from quire.worker.moves import BlockMover, Moves
from quire.worker.parallel import TensorParallel
from quire.worker.pool import KVPool
from quire.worker.programs import DecodePrograms
from quire.worker.sampler import Draw, Scores
from quire.worker.table import RowTable
from quire.worker.transfer import Arrival, Transfer
from quire.worker.work import Work

NOTHING = Draw(None)


class Structure(Protocol):
    """What of a model's structure the runtime needs."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class Model(Protocol):
    """A decoder as the runtime sees it."""

    @property
    def spec(self) -> Structure: ...
    @property
    def num_local_kv_heads(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    def forward(self, batch: Batch, kv: torch.Tensor) -> torch.Tensor: ...
    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose results are on their way."""

    arrival: Arrival
    """Sampled tokens [S] int32, -1 where there is none, and the scores' tensors; nothing on ranks other than 0."""
    scores: Scores | None


class Stepper:
    """On several ranks each step is launched on all of them, in the same order."""

    def __init__(
        self,
        table: RowTable,
        pool: KVPool,
        mover: BlockMover,
        model: Model,
        tp: TensorParallel,
        transfer: Transfer,
        deterministic: bool,
    ) -> None:
        self.table, self.pool, self.mover = table, pool, mover
        self._model, self._tp, self._transfer = model, tp, transfer
        self._deterministic = deterministic
        self.num_lines = transfer.num_lines
        """Steps that can be under way at once."""
        self._inputs = StepInputs(table, transfer)
        self._graphs: DecodeGraphs | DecodePrograms | None = None

    @torch.inference_mode()
    def record(self, recorder: Recorder, sizes: list[int]) -> None:
        """From here on decode steps are replayed."""
        graphs = DecodeGraphs(sizes, self._forward_static, self._finish_greedy)
        self._inputs.clear(sizes[-1])
        graphs.record(recorder)
        self._graphs = graphs

    @torch.inference_mode()
    def program(self) -> None:
        """The same on a CPU, where steps are recorded as they come; the first is recorded here, for what it has to
        compile."""
        self._graphs = DecodePrograms(
            lambda num_rows: self._inputs.static_batch(num_rows, self._deterministic),
            lambda batch: self._model.forward(batch, self.pool.tensor),
            self._finish_greedy,
        )
        self._graphs.padded(1)

    @torch.inference_mode()
    def launch(self, plan: worker_pb2.StepPlan, line: int) -> Launched:
        """Raises PlanError, before anything has changed, for a plan that does not fit the rows. `line` may not be that
        of a step whose results have not arrived."""
        table = self.table
        moves = self.mover.check(plan)
        work = table.apply(plan)
        self._transfer.begin()
        if not work.rows.size:
            if work.changes or moves:
                parcel = self._inputs.load(line, work)
                self._prepare(parcel, work, moves)
            return Launched(self._transfer.fetch([]), None)
        shared = None
        if not self._deterministic:
            shared = find_shared(table, work)
        padded = self._padded(work, shared)
        parcel = self._inputs.load(line, work, padded)
        # Known alike on every rank, as the collectives that follow have to be the same.
        is_greedy = table.sampler.is_greedy(work.sampling_rows)
        draw = NOTHING
        if self._tp.rank == 0 and not is_greedy:
            draw = table.sampler.prepare(
                work.sampling_rows,
                table.counts.num_prompt,
                table.counts.num_known,
                parcel.place,
                table.token_ids,
            )
        self._prepare(parcel, work, moves)
        if padded and self._graphs is not None:
            hidden = self._graphs.forward(padded)[: len(work.rows)]
        else:
            batch = self._inputs.batch(parcel, work, self._deterministic, shared)
            hidden = self._model.forward(batch, self.pool.tensor)
        scores = None
        if padded and self._graphs is not None and is_greedy:
            self._graphs.finish(padded)
        elif work.sampling_rows.size:
            scores = self._sample(work, draw, hidden)
        table.advance(work)
        return Launched(self._fetch(line, work, scores), scores)

    def _prepare(self, parcel: Parcel, work: Work, moves: Moves) -> None:
        """Everything that happens before the step computes."""
        loaded = self.mover.load(moves, parcel.place) if moves else None
        self._inputs.send(parcel, work.changes)
        if loaded is not None:
            self.mover.run(loaded)

    def _padded(self, work: Work, shared: SharedPrefixes | None) -> int:
        """Rows of the recording that this step replays; 0: it is launched."""
        if self._graphs is None or not work.is_decode:
            return 0
        if shared is not None and self._graphs.is_worth_launching(shared, self._layer_bytes):
            return 0
        return self._graphs.padded(len(work.rows))

    @property
    def _layer_bytes(self) -> int:
        """Of one token's keys and values in one layer."""
        shape = self.pool.shape
        return shape.num_bytes // shape.block_size // shape.num_layers

    def _forward_static(self, num_rows: int) -> torch.Tensor:
        batch = self._inputs.static_batch(num_rows, self._deterministic)
        return self._model.forward(batch, self.pool.tensor)

    def _finish_greedy(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._store(self._choose(NOTHING, hidden)[0], are_some=False)

    def _sample(self, work: Work, draw: Draw, hidden: torch.Tensor) -> Scores | None:
        tokens, scores = self._choose(draw, hidden)
        self._store(tokens, are_some=not work.is_decode)
        return scores

    def _choose(self, draw: Draw, hidden: torch.Tensor) -> tuple[torch.Tensor, Scores | None]:
        """Tokens [S] int64 as rank 0 samples them, on every rank."""
        logits = self._model.logits(hidden)
        tokens, scores = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device), None
        if self._tp.rank == 0:
            tokens, scores = self.table.sampler.sample(draw, logits, self.table.token_ids)
        return self._tp.broadcast(tokens), scores

    def _store(self, tokens: torch.Tensor, are_some: bool) -> torch.Tensor:
        store_tokens(self.table.tensors, self._inputs.step, tokens, are_some)
        return tokens

    def _fetch(self, line: int, work: Work, scores: Scores | None) -> Arrival:
        if self._tp.rank:
            return self._transfer.fetch([])
        results = self._inputs.step.results[line, : len(work.sampling_rows)]
        return self._transfer.fetch([results, *(scores.tensors if scores is not None else ())])
