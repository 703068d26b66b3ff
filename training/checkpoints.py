"""Where an unfinished run keeps its state: `<out>.checkpoints/`, never inside the adapter it will become."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import output
from training.errors import OutputExists, OutputTaken, ResumeMismatch
from training.lock import held

_RUN_FILE = "run.json"
_SUFFIX = ".checkpoints"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. They hold optimizer and random state besides the weights."""

    directory: Path
    identity: Mapping[str, Any]  # what a run must have in common with its checkpoints

    @classmethod
    def beside(cls, out: Path, identity: Mapping[str, Any]) -> Checkpoints:
        """Those of the run that writes `out`."""
        return cls(output.beside(out, _SUFFIX), identity)

    def alone(self) -> AbstractContextManager[None]:
        """Hold them, and so the run's output, for this process; raises `OutputTaken` where another one does."""
        out = self.directory.with_name(self.directory.name.removesuffix(_SUFFIX))
        return held(
            self.directory,
            OutputTaken(f"another process is training into {out}: wait for it, stop it, or choose another --out"),
        )

    def check(self, *, resume: bool) -> None:
        """Look whether they are as a run needs them: none there, or, to be resumed, this run's.

        Raises `OutputExists` when a run that is not to be resumed would overwrite checkpoints, `ResumeMismatch` when
        there is nothing to resume or it belongs to another run; the message names what differs.
        """
        if not resume:
            if self.latest() is not None:
                raise OutputExists(f"{self.directory} holds an interrupted run: give --resume, or remove it")
            return
        if self.latest() is None:
            raise ResumeMismatch(f"there is no checkpoint in {self.directory}")
        was = json.loads((self.directory / _RUN_FILE).read_text("utf-8"))
        changed = [_told(key, was.get(key), now) for key, now in sorted(self.identity.items()) if was.get(key) != now]
        if changed:
            raise ResumeMismatch(
                f"the checkpoints in {self.directory} were made with other: {', '.join(changed)}; "
                "resume with what they were made with, or remove them to begin anew"
            )

    def begin(self) -> None:
        """Make the directory, with what the run is. Only once nothing can refuse the run any more."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / _RUN_FILE).write_text(json.dumps(dict(self.identity), indent=1), "utf-8")

    def latest(self) -> Path | None:
        """The newest checkpoint, if any."""
        found = [path for path in self.directory.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def discard(self) -> None:
        """Remove them: the run is done."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _told(key: str, was: Any, now: Any) -> str:
    """What differs: numbers and fields with both values, digests by name alone."""
    if isinstance(was, dict) and isinstance(now, dict):
        fields = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
        return f"{key} ({', '.join(f'{name} {was.get(name)}, not {now.get(name)}' for name in fields)})"
    if all(value is None or isinstance(value, int) for value in (was, now)):
        return f"{key} ({was}, not {now})"
    return key
