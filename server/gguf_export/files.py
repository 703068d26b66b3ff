"""Writing GGUF: a whole model, and a LoRA as llama.cpp's `--lora` takes it.

Vectors (norms, biases) are float32 in every file, as llama.cpp wants them; matrices have the type asked for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from hub.errors import TargetNotEmpty
from server.errors import ExportUnsupported
from server.gguf_export.architecture import Architecture
from server.gguf_export.vocabulary import Vocabulary

GgufType = Literal["f32", "f16", "bf16"]
GGUF_TYPES: tuple[GgufType, ...] = ("f32", "f16", "bf16")
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}


def base_tensors(directory: Path, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """(llama.cpp's name, float32 values in llama.cpp's order) of every parameter in the *.safetensors of `directory`.

    Raises `ExportUnsupported` for a parameter without a place there.
    """
    if architecture.rope_factors:
        yield "rope_freqs.weight", torch.tensor(architecture.rope_factors, dtype=torch.float32)
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for parameter in opened.keys():  # noqa: SIM118  # safe_open is no mapping
                if parameter == "lm_head.weight" and architecture.tied:
                    continue
                name = architecture.tensor_name(parameter)
                if name is None:
                    raise ExportUnsupported(f"{parameter} has no place in llama.cpp's {architecture.name}")
                yield name, architecture.reordered(parameter, opened.get_tensor(parameter).float())


def write_model(directory: Path, out: Path, kind: GgufType, title: str) -> None:
    """The transformers model in `directory` as the file `out`; raises `ExportUnsupported` or `TargetNotEmpty`."""
    import gguf

    architecture = Architecture.of(directory)
    vocabulary = Vocabulary.of(directory, architecture.vocabulary)
    with _writing(out, architecture) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(title)
        writer.add_block_count(architecture.layers)
        writer.add_context_length(architecture.context)
        writer.add_embedding_length(architecture.hidden)
        writer.add_feed_forward_length(architecture.inner)
        writer.add_head_count(architecture.heads)
        writer.add_head_count_kv(architecture.kv_heads)
        writer.add_key_length(architecture.head_dim)
        writer.add_value_length(architecture.head_dim)
        writer.add_rope_dimension_count(architecture.head_dim)
        writer.add_rope_freq_base(architecture.rope_base)
        if architecture.rope_linear != 1:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(architecture.rope_linear)
        writer.add_layer_norm_rms_eps(architecture.epsilon)
        writer.add_vocab_size(architecture.vocabulary)
        writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[kind]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        vocabulary.write(writer)
        for name, values in base_tensors(directory, architecture):
            add_tensor(writer, name, values, kind)


def write_lora(
    architecture: Architecture, pairs: dict[str, tuple[Tensor, Tensor]], alpha: float, out: Path, kind: GgufType
) -> None:
    """`out`: for each llama.cpp tensor its (A [r, in], B [out, r]); llama.cpp adds alpha / r · B A to it."""
    import gguf

    with _writing(out, architecture) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[kind]))
        for name, (a, b) in pairs.items():
            add_tensor(writer, f"{name}.lora_a", a, kind)
            add_tensor(writer, f"{name}.lora_b", b, kind)


def add_tensor(writer: Any, name: str, values: Tensor, kind: GgufType) -> None:
    """Add float32 `values` as `kind`; raises `ExportUnsupported` where they do not fit it."""
    import gguf

    array = values.contiguous().numpy()
    if kind == "f32" or values.ndim == 1:
        writer.add_tensor(name, array)
    elif kind == "f16":
        half = values.half()
        if not bool(half.isfinite().all()):
            raise ExportUnsupported(f"{name} has values beyond float16: write bf16 or f32")
        writer.add_tensor(name, half.contiguous().numpy())
    else:
        # numpy has no bfloat16; the writer takes raw bytes and works out the shape. (gguf's own rounding is slow.)
        raw = values.bfloat16().contiguous().view(torch.int16).numpy().view("uint8")
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def refuse_taken_file(out: Path) -> None:
    """Raise `TargetNotEmpty` where `out` is there already."""
    if out.exists() or out.is_symlink():
        raise TargetNotEmpty(f"{out} already exists; name a new file")


def publish(partial: Path, out: Path) -> None:
    """Give a finished file its name, on disk and readable by all; raises `TargetNotEmpty`."""
    partial.chmod(0o644)
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    refuse_taken_file(out)
    partial.rename(out)


def write_checked(out: Path, write: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    """Let `write` make a file beside `out` and `check` read it; only when both return does it get its name."""
    refuse_taken_file(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        partial = Path(aside) / out.name
        write(partial)
        check(partial)
        publish(partial, out)


@contextmanager
def _writing(out: Path, architecture: Architecture) -> Iterator[Any]:
    import gguf

    writer = gguf.GGUFWriter(out, architecture.name)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
