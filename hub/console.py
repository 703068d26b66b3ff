"""The console script `hub`: so little of it that Ctrl-C finds somebody home while everything else is imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; see `hub.cli.main`."""
    try:
        from hub.cli import main as run

        run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
