"""The requests in progress, each with its sequences, and what is kept for them by request."""

from __future__ import annotations

from collections.abc import Iterable

from quire.scheduler.blocks import AuditError
from quire.scheduler.ranking import Ranking
from quire.scheduler.request import Request
from quire.scheduler.sequence import Sequence
from quire.scheduler.stops import StopTokens


class InProgress:
    """By request id."""

    def __init__(self) -> None:
        self.stops = StopTokens()
        self.rankings: dict[str, Ranking] = {}
        """Of requests of which more samples are made than returned, until their answers are known."""
        self.num_cut_off = 0
        """Sequences so far that have ended while tokens of theirs were in flight."""
        self._sequences: dict[str, list[Sequence]] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    def __getitem__(self, request_id: str) -> list[Sequence]:
        """A copy; empty for a request that is not there."""
        return list(self._sequences.get(request_id, ()))

    @property
    def requests(self) -> list[Request]:
        return [held[0].request for held in self._sequences.values()]

    def add(self, request: Request, sequences: list[Sequence]) -> None:
        self._sequences[request.request_id] = sequences
        self.stops.add(request.stop_token_ids)
        if request.params.is_ranked and request.params.beam_width is None:
            self.rankings[request.request_id] = Ranking(request)

    def replace(self, request: Request, sequences: list[Sequence]) -> None:
        """Beams that have changed."""
        self._sequences[request.request_id] = sequences

    def remove(self, sequence: Sequence, is_complete: bool) -> None:
        """One of its sequences has ended: by itself, or because it was cancelled."""
        request = sequence.request
        held = self._sequences[request.request_id]
        held.remove(sequence)
        self.num_cut_off += sequence.num_in_flight > 0
        if held:
            return
        del self._sequences[request.request_id]
        self.stops.remove(request.stop_token_ids)
        if not is_complete:  # else it is still to be told of the last token
            self.rankings.pop(request.request_id, None)

    def audit(self, sequences: Iterable[Sequence]) -> None:
        """Compare with the sequences of all groups. Raises AuditError."""
        held = {id(sequence) for held in self._sequences.values() for sequence in held}
        if held != {id(sequence) for sequence in sequences}:
            raise AuditError("the requests and the groups do not hold the same sequences")
        self.stops.audit(request.stop_token_ids for request in self.requests)
