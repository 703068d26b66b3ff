"""A captured graph without a GPU: the launches of one run, with the tensors they had, launched again.

As on a GPU, nothing of Python runs again: a value that Python saw while it captured stays what it was, an input whose
address changed is not seen, and what was allocated meanwhile is memory with anything in it (here NaN). What a capture
on a GPU forbids, asking the device for a value or sending it new ones, raises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

_FORBIDDEN = {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::equal", "aten::masked_select"}
_ALLOCATIONS = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}


class Forbidden(AssertionError):
    """What a capture on a GPU would not survive."""


class Tape:
    """What was launched, in order."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], object]] = []
        self.kernels: list[str] = []

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        """Run it and remember what it launches."""
        original = InterpretedFunction.run
        mode = _Recorder(self)
        recording = threading.get_ident()  # the loader's launches are no part of the step

        def launched(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            def again() -> None:
                original(function, *args, grid=grid, warmup=warmup, **kwargs)

            if threading.get_ident() != recording:
                again()
                return
            self.kernels.append(function.__name__)
            self.launches.append(again)
            mode.inside = True
            try:
                again()
            finally:
                mode.inside = False

        InterpretedFunction.run = launched
        try:
            with mode:
                return run()
        finally:
            InterpretedFunction.run = original

    def replay(self) -> None:
        for launch in self.launches:
            launch()


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.inside = False  # a kernel of Triton's interpreter, which is one launch
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        name = func._schema.name
        if name in _FORBIDDEN:
            raise Forbidden(f"{name} cannot be captured: it waits for the device or sends it something new")
        out = func(*args, **kwargs)
        if name in _ALLOCATIONS:
            if out.is_floating_point():
                self._tape.launches.append(lambda: out.fill_(float("nan")))
        elif not _is_view(func, args, out):
            self._tape.launches.append(lambda: _again(func, args, kwargs, out))
        return out


def _is_view(func: Any, args: Any, out: Any) -> bool:
    """Whether nothing was written: the result is other eyes on an argument's memory."""
    returned = func._schema.returns
    if not returned or returned[0].alias_info is None or returned[0].alias_info.is_write:
        return False
    # `to`, `contiguous` and `reshape` are views only when they have nothing to do.
    held = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
    return all(t.untyped_storage().data_ptr() in held for t in tree_leaves(out) if isinstance(t, Tensor))


def _again(func: Any, args: Any, kwargs: Any, before: Any) -> None:
    results = func(*args, **kwargs)
    for old, new in zip(tree_leaves(before), tree_leaves(results), strict=True):
        if isinstance(old, Tensor) and old is not new:
            old.copy_(new)


class TapeGraphs:
    """`server.kernels.gpu.graphs.Graphs` over tapes."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `Graphs.capture`."""
        tape = Tape()
        try:
            out = tape.record(run)
        except Forbidden:
            run()  # tables that are made once; what is forbidden in every run is so again
            tape = Tape()
            out = tape.record(run)
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            tape.replay()
            return out

        return replay
