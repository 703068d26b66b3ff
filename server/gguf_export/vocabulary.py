"""A tokenizer as GGUF metadata. llama.cpp reimplements tokenizers, so only those it has under a name can be written.

Byte-level BPE is told apart by how text is cut before merging, which tokenizer.json spells out. A cut that is not one
of llama.cpp's is refused: written under a wrong name, prompts would silently become other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import ExportUnsupported

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's token types


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to tokenize as the base does."""

    cut: str  # llama.cpp's name of the way text is cut before merging: "gpt-2", "smollm", "llama-bpe", "qwen2"
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    ids: Mapping[str, int]  # of "bos", "eos", "unk", "pad", as far as there are
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None

    @classmethod
    def of(cls, directory: Path, rows: int) -> Vocabulary:
        """That of the tokenizer in `directory`, filled up to the embedding's `rows`; raises `ExportUnsupported`."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(str(directory))
        if not getattr(tokenizer, "is_fast", False):
            raise ExportUnsupported("the base's tokenizer is not one of the `tokenizers` library")
        told = json.loads(tokenizer.backend_tokenizer.to_str())
        model = told["model"]
        if model["type"] != "BPE" or model.get("byte_fallback"):
            raise ExportUnsupported("only byte-level BPE tokenizers are written as GGUF; this base's is another kind")
        normalizer = told.get("normalizer")
        if normalizer is not None and normalizer["type"] != "NFC":
            raise ExportUnsupported(f"the tokenizer normalizes text with {normalizer['type']}, llama.cpp does not")
        cut = _cut(told.get("pre_tokenizer"))
        if bool(model.get("ignore_merges")) != (cut == "llama-bpe"):
            raise ExportUnsupported(f"the tokenizer's ignore_merges differs from that of llama.cpp's {cut}")
        words = {int(index): word for word, index in model["vocab"].items()}
        types = dict.fromkeys(words, _NORMAL)
        for added in told.get("added_tokens", ()):
            words[added["id"]] = added["content"]
            types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
        if max(words) >= rows:
            raise ExportUnsupported(f"the tokenizer has token {max(words)}, the embedding only {rows} rows")
        empty = tokenizer("").input_ids
        named = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
        ids = {name: int(value) for name, value in named.items() if value is not None}
        template = tokenizer.chat_template
        return cls(
            cut=cut,
            tokens=tuple(words.get(index, f"[PAD{index}]") for index in range(rows)),
            types=tuple(types.get(index, _UNUSED) for index in range(rows)),
            merges=tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]),
            ids=ids,
            adds_bos=bool(empty) and empty[0] == ids.get("bos"),
            adds_eos=bool(empty) and empty[-1] == ids.get("eos"),
            chat_template=template if isinstance(template, str) else None,
        )

    def write(self, writer: Any) -> None:
        """Add it to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        writer.add_token_merges(list(self.merges))
        for name, index in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        writer.add_add_space_prefix(False)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def _cut(told: Any) -> str:
    steps = told["pretokenizers"] if told and told["type"] == "Sequence" else [told] if told else []
    shapes = [_shape(step) for step in steps]
    known = {
        ("bytes, cut",): "gpt-2",
        ("digits", "bytes, cut"): "smollm",
        (_LLAMA_3, "bytes"): "llama-bpe",
        (_QWEN_2, "bytes"): "qwen2",
    }
    found = known.get(tuple(shapes))
    if found is None:
        raise ExportUnsupported(
            f"the tokenizer cuts text in a way that has no name in llama.cpp here: {', '.join(shapes) or 'not at all'}"
        )
    return found


def _shape(step: Mapping[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return "bytes, cut"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return regex
    return json.dumps(dict(step), sort_keys=True)
