"""Triton's interpreter without what it computes and throws away: two fifths of its time, and no answer's business."""

from __future__ import annotations

from typing import Any


def spare() -> None:
    """From here on a kernel's launch prepares the language once, and sums are not checked where no check is heard.

    The interpreter swaps the language's functions for its own when a kernel is launched, and again, with the same
    outcome, at every call from one jitted function to another. It also makes each integer sum a second time in 64 bits,
    for an assertion that is made only with `debug`.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    check = TritonSemantic.binary_op_sanitize_overflow_impl
    prepared: set[int] = set()  # during one launch: the modules whose functions are the interpreter's

    def prepare_once(fn: Any) -> Any:
        modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if modules <= prepared:
            return interpreter._LangPatchScope()
        prepared.update(modules)
        return prepare(fn)

    def launched(self: Any, *arguments: Any, **named: Any) -> None:
        prepared.clear()
        try:
            launch(self, *arguments, **named)
        finally:
            prepared.clear()

    def checked(self: Any, *arguments: Any) -> None:
        if self.builder.options.debug:
            check(self, *arguments)

    interpreter._patch_lang = prepare_once
    interpreter.GridExecutor.__call__ = launched
    TritonSemantic.binary_op_sanitize_overflow_impl = checked
