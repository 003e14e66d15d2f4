"""The buddy allocator: contiguous runs whose sizes are powers of two (Knuth, volume 1, section 2.5).

What systems before paging use for KV caches whose tensors must be contiguous (PagedAttention paper, section 6.1).
"""

from __future__ import annotations

from quire.scheduler.blocks import AuditError


class Buddy:
    """`size` units, 0 to size - 1. A size that is no power of two is begun with as few runs as possible."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_free = size
        self._free: list[dict[int, None]] = [{} for _ in range(size.bit_length())]
        """Starts of free runs by order, of 2^order units each; a dictionary is a set with an order."""
        self._orders: dict[int, int] = {}
        """Of the runs in use, by start."""
        start = 0
        for order in range(size.bit_length() - 1, -1, -1):
            if size >> order & 1:
                self._free[order][start] = None
                start += 1 << order

    def fits(self, units: int) -> bool:
        """Whether a run of so many units can be had now."""
        return any(self._free[_order(units) :])

    def allocate(self, units: int) -> range:
        """The smallest power of two that holds `units`. The caller has checked `fits`."""
        wanted = _order(units)
        order = next((o for o in range(wanted, len(self._free)) if self._free[o]), None)
        if order is None:
            raise AuditError(f"no run of {units} units: the caller must ask fits() first")
        start, _ = self._free[order].popitem()
        while order > wanted:
            order -= 1
            self._free[order][start + (1 << order)] = None
        self._orders[start] = wanted
        self.num_free -= 1 << wanted
        return range(start, start + (1 << wanted))

    def free(self, start: int) -> None:
        """Give back the run that begins there; it is joined with its free neighbours of equal size."""
        if start not in self._orders:
            raise AuditError(f"no run in use begins at {start}")
        order = self._orders.pop(start)
        self.num_free += 1 << order
        while (buddy := start ^ (1 << order)) in self._free[order]:
            del self._free[order][buddy]
            start = min(start, buddy)
            order += 1
        self._free[order][start] = None

    def audit(self) -> None:
        """Every unit is in one run. Raises AuditError."""
        runs = [(start, 1 << order) for order, starts in enumerate(self._free) for start in starts]
        if sum(length for _, length in runs) != self.num_free:
            raise AuditError(f"{runs} are free, which is not {self.num_free} units")
        runs += [(start, 1 << order) for start, order in self._orders.items()]
        end = 0
        for start, length in sorted(runs):
            if start != end or start % length:
                raise AuditError(f"the run of {length} at {start} overlaps another, leaves a gap or is not aligned")
            end += length
        if end != self.size:
            raise AuditError(f"runs cover {end} of {self.size} units")


def _order(units: int) -> int:
    return (units - 1).bit_length()
