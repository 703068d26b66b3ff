"""C sources compiled on the machine that runs them, kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import platformdirs

log = logging.getLogger(__name__)

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


def build(source: str, included: Sequence[str], flags: Sequence[str]) -> ctypes.CDLL | None:
    """The library made of `source`, compiled when it is not in the cache yet (about 2 s).

    `included` names the files it includes. None, with a line in the log, where there is no working compiler.
    """
    wanted = os.environ.get("CC", "cc")
    compiler = shutil.which(wanted)
    if compiler is None:
        log.warning("no C compiler (%s): without one a CPU serves about three times slower; install gcc", wanted)
        return None
    folder = resources.files(__package__)
    sources = {name: folder.joinpath(name).read_bytes() for name in (source, *included)}
    key = hashlib.sha256(repr((sources, _FLAGS, flags, compiler, sorted(processor_flags()))).encode()).hexdigest()[:16]
    target = Path(platformdirs.user_cache_dir("loraplex")) / "native" / f"{Path(source).stem}-{key}.so"
    try:
        if not target.exists():
            _compile([compiler, *_FLAGS, *flags], source, sources, target)
        # torch's OpenMP is loaded already, and the library asks for it by the same name: one pool of threads.
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s cannot be built, plain torch is used instead: %s", source, error)
        return None


def processor_flags() -> frozenset[str]:
    """What the processor can do, as /proc/cpuinfo names it; what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset({platform.processor()})
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())


def _compile(command: Sequence[str], source: str, sources: dict[str, bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for name, text in sources.items():
            (Path(folder) / name).write_bytes(text)
        built = Path(folder) / "built.so"
        subprocess.run(
            [*command, str(Path(folder) / source), "-o", str(built), "-lm"],
            check=True,
            capture_output=True,
            timeout=120,
        )
        built.replace(target)
