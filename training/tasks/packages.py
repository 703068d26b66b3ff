"""Files inside packages: of installed ones without importing them, of a source archive without running it."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import platformdirs

from training.errors import SourceUnavailable


def installed_directory(module: str, distribution: str) -> tuple[Path, str]:
    """(directory, version) of an installed package. Raises `SourceUnavailable`, saying how to install it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SourceUnavailable(f"the package {distribution} is not installed: pip install {distribution}")
    return Path(spec.origin).parent, version(distribution)


def source_archive(distribution: str, pinned_version: str, sha256: str) -> Path:
    """The pinned source archive of a distribution, fetched once by pip into the user's cache.

    Its bytes are checked against `sha256` each time. Raises `SourceUnavailable` when pip cannot fetch it or the bytes
    are others.
    """
    cached = Path(platformdirs.user_cache_dir("loraplex")) / "sources" / f"{distribution}-{pinned_version}.tar.gz"
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as aside:
            _downloaded(distribution, pinned_version, Path(aside)).replace(cached)
    with cached.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        cached.unlink()
        raise SourceUnavailable(
            f"the source archive of {distribution} {pinned_version} is not the pinned one (sha256 {found[:12]}…)"
        )
    return cached


def _downloaded(distribution: str, pinned_version: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-binary", distribution, "--no-deps", "--dest", str(directory), f"{distribution}=={pinned_version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted(directory.glob("*.tar.gz"))
    if done.returncode or not archives:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise SourceUnavailable(
            f"pip cannot download the source of {distribution} {pinned_version}"
            + (f": {lines[-1].removeprefix('ERROR: ')}" if lines else "")
        )
    return archives[0]
