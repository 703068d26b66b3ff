"""Tests of hub.tensor_values beside those of whole adapters."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
os.sched_setaffinity(0, range(os.cpu_count()))
import time
import numpy as np
from hub import tensor_values
from hub.safetensors_file import TensorSlot

data = memoryview(np.full(4_000_000, 0.01, np.float32).tobytes())
slot = TensorSlot("F32", (4_000_000,), 0, len(data))
tensor_values.look_at("x", slot, data)
shares = []
for _ in range(8):
    own, all_threads = time.thread_time(), time.process_time()
    for _ in range(4):
        assert abs(tensor_values.look_at("x", slot, data).norm - 20) < 1e-5
    own, all_threads = time.thread_time() - own, time.process_time() - all_threads
    shares.append((all_threads - own) / own)
print(min(shares))  # what the look itself causes: what starting up left running only adds
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_the_look_at_a_tensor_leaves_the_other_cores_alone() -> None:
    """np.dot spread each piece over BLAS's threads, whose spinning took ten times as long as the look itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    assert float(done.stdout) < 0.5
