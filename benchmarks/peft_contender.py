"""transformers' `generate`, with PEFT's mixed batch: one adapter name for every row.

Given its best footing: the base cases run on a plain model without PEFT's wrappers, adapters are kept in float32
as PEFT does by default (on CPU that is half as fast again as bfloat16), and the solo case switches the adapter on
instead of naming it for each row.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.contender import Setup
from benchmarks.workload import Case, prompt


class PeftContender:
    """A plain model for the base cases and a PEFT model with every adapter loaded for the others."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        transformers_logging.disable_progress_bar()
        warnings.simplefilter("ignore")  # PEFT's advice to trainers
        self._new_tokens = setup.new_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(setup.base, padding_side="left")
        self._plain = _load(setup.base)
        self._names = [directory.name for directory in setup.adapters]
        first, *rest = setup.adapters
        self._peft = PeftModel.from_pretrained(_load(setup.base), str(first), adapter_name=first.name)
        for directory in rest:
            self._peft.load_adapter(str(directory), directory.name)
        self._peft.eval()

    def run(self, case: Case) -> list[list[int]]:
        """See `Contender.run`."""
        inputs = self._tokenizer([prompt(number) for number in range(case.prompts)], return_tensors="pt", padding=True)
        arguments: dict[str, Any] = {
            **inputs,
            "max_new_tokens": self._new_tokens,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": self._tokenizer.eos_token_id,
        }
        model: Any = self._plain
        if case.adapters:
            model = self._peft
            if case.prompts == 1:
                model.set_adapter(self._names[0])
            else:
                arguments["adapter_names"] = [self._names[row % len(self._names)] for row in range(case.prompts)]
        with torch.inference_mode():
            output = model.generate(**arguments)
        answers: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return answers


def _load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
