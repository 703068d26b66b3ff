"""Adapters trained by one recipe have the same config and the same file header, byte for byte. What was found out about
the first of them, every tensor bound and where its values go, holds for all: the others need no look at their names."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hub.lora_config import LoraConfig
from server.adapters.rank_rows import Pair, SiteWeights, arrivals, refuse_odd, room_for
from server.adapters.weights_file import address_of, header_of
from server.kernels.native.loading import Arrivals, convertible

MOST = 16  # layouts that are remembered


@dataclass(frozen=True)
class Layout:
    """Where the matrices of a plain LoRA lie in its file, and what rows they become."""

    size: int  # bytes of the whole file
    shapes: Mapping[str, tuple[int, int, int]]  # module → (rank, in, out)
    moves: Arrivals  # counted from the file's first byte and from the first module's rows
    dtype: torch.dtype

    def rows(self, data: bytes) -> dict[str, SiteWeights]:
        """See `rank_rows`, whose bits these are. Raises `AdapterUnservable` for what is not finite."""
        sites = room_for(self.shapes, self.dtype)
        refuse_odd(self.moves.convert(address_of(data), _first(sites)), list(sites))
        return sites


class Layouts:
    """Of one base. May be asked from any thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[bytes, bytes], Layout] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, config: bytes, data: bytes) -> Layout | None:
        """The layout of such a file with such a config, where one was kept."""
        key = config, header_of(data)
        with self._lock:
            layout = self._known.get(key)
            if layout is None or layout.size != len(data) or address_of(data) % 4:
                return None
            self._known.move_to_end(key)
            return layout

    def keep(
        self,
        config: bytes,
        data: bytes,
        parsed: LoraConfig,
        pairs: Mapping[str, Pair],
        sites: Mapping[str, SiteWeights],
    ) -> None:
        """The file `data` with this config holds `pairs`, as views into it, and nothing else; they became `sites`. What
        the native code does not convert, or had to be copied first, is not kept."""
        if not pairs:
            return
        tensors = [tensor for pair in pairs.values() for tensor in (pair.a, pair.b)]
        start, dtype = address_of(data), next(iter(sites.values())).a.dtype
        inside = all(start <= t.data_ptr() and t.data_ptr() + t.nbytes <= start + len(data) for t in tensors)
        if not inside or start % 4 or not all(convertible(tensor, dtype) for tensor in tensors):
            return
        layout = Layout(
            len(data),
            {module: pair.shape for module, pair in pairs.items()},
            Arrivals(arrivals(pairs, sites, parsed), start, _first(sites)),
            dtype,
        )
        with self._lock:
            self._known[config, header_of(data)] = layout
            while len(self._known) > MOST:
                self._known.popitem(last=False)


def _first(sites: Mapping[str, SiteWeights]) -> int:
    return next(iter(sites.values())).a.data_ptr()
