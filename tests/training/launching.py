"""How a person starts `hub` in two processes on a machine without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

HUB_IN_TWO_PROCESSES: Final = (
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    str(Path(sys.executable).with_name("hub")),
)  # fmt: skip
