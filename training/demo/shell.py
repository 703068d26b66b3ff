"""The demo types real commands: what it shows after `$` is what ran."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from training.errors import DemoFailed

HUB = Path(sys.executable).with_name("hub")


@dataclass(frozen=True)
class Shell:
    """Runs `hub` verbs against the demo's own hub directory."""

    console: Console
    hub: Path

    def show(self, *args: str) -> None:
        """Run a verb and let it write to the terminal. Raises `DemoFailed` when it does not succeed."""
        self._echo(args)
        ended = subprocess.run([str(HUB), *args, *self._hub_option(args)], check=False)
        if ended.returncode:
            raise DemoFailed(f"`hub {args[0]}` ended with status {ended.returncode}; its own message is above")

    def ask(self, *args: str, echo: bool = True) -> Any:
        """Run a verb with --json and give back what it printed. Raises `DemoFailed`."""
        if echo:
            self._echo(args)
        command = [str(HUB), *args, "--json", *self._hub_option(args)]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        if ended.returncode:
            raise DemoFailed(f"`hub {args[0]}` failed: {ended.stderr.strip()}")
        return json.loads(ended.stdout)

    def say(self, text: str) -> None:
        """What came of it, under the command."""
        self.console.print(f"  {text}", soft_wrap=True)

    @contextmanager
    def serving(self, *args: str) -> Iterator[dict[str, str]]:
        """`hub serve` in the background: its addresses ("grpc", "metrics", …) while inside, SIGTERM on leaving."""
        command = ("serve", *args)
        self._echo(command)
        process = subprocess.Popen(
            [str(HUB), *command, "--listen", "127.0.0.1:0", "--metrics-port", "0", "--hub", str(self.hub)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        said: deque[str] = deque(maxlen=20)
        # Read on, or a server that logs much would stop at a full pipe.
        reader = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        reader.start()
        with process:
            try:
                with self.console.status("loading the base …"):
                    line = process.stdout.readline() if process.stdout else ""
                if not line.startswith("ready"):
                    process.wait()
                    reader.join()
                    raise DemoFailed("`hub serve` did not start: " + "".join(said).strip())
                self.say(f"[dim]{line.strip()}[/dim]")
                yield dict(word.split("=", 1) for word in line.split()[1:] if "=" in word)
            finally:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                reader.join()

    def _hub_option(self, args: Sequence[str]) -> tuple[str, ...]:
        return () if args[0] == "data" else ("--hub", str(self.hub))

    def _echo(self, args: Sequence[str]) -> None:
        self.console.print(f"[bold]$ hub {shlex.join(args)}[/bold]", soft_wrap=True)
