"""The parts of adapters that native layers take on: DoRA and biases on their linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from server.kernels.native.plans import AffinePlan, AffineTable

if TYPE_CHECKING:
    from server.adapters.parts import AdapterParts, ModuleParts, PartSpan


class AffineParts:
    """Knows the decoder's linears; the tables it makes live as long as the adapters' parts do."""

    def __init__(self, places: Mapping[str, int], layers: int) -> None:
        """places: module path → `AffineTable`'s place."""
        self._places = places
        self._count = 12 * layers
        self._tables: WeakKeyDictionary[AdapterParts, AffineTable | None] = WeakKeyDictionary()

    def takes(self, path: str, parts: ModuleParts) -> bool:
        """Whether these parts of a module are scale and shift alone, in a layer that runs natively."""
        return path in self._places and parts.elementwise

    def plan(self, spans: Iterable[PartSpan]) -> AffinePlan | None:
        """What `takes` took of these parts; None for nothing."""
        tables = ((span.t0, span.t1, span.weight, self._table(span.parts)) for span in spans)
        found = [(t0, t1, weight, table) for t0, t1, weight, table in tables if table is not None]
        return AffinePlan(found) if found else None

    def _table(self, parts: AdapterParts) -> AffineTable | None:
        if parts not in self._tables:
            given = {
                self._places[path]: (module.scale, module.shift)
                for path, module in parts.modules.items()
                if self.takes(path, module) and (module.scale is not None or module.shift is not None)
            }
            self._tables[parts] = AffineTable(self._count, given) if given else None
        return self._tables[parts]
