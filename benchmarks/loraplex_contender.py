"""Our engine through its offline door: no gRPC, no hub, the same step loop that serves."""

from __future__ import annotations

import uuid

from transformers.utils import logging as transformers_logging

from benchmarks.contender import Setup
from benchmarks.workload import Case, prompt
from server.adapters.weights import AdapterFiles
from server.config import EngineLimits, ModelConfig, Quantization
from server.engine.engine import Engine
from server.engine.request import AdapterUse, Request, Stopping


class LoraplexContender:
    """One engine; its adapters are loaded by the round that is not counted."""

    def __init__(self, setup: Setup, quantization: Quantization) -> None:
        transformers_logging.disable_progress_bar()
        self._stopping = Stopping(max_new_tokens=setup.new_tokens, ignore_eos=True)
        self._uses = tuple(
            AdapterUse(digest=f"sha256:{number:064x}", version=f"bench/{directory.name}@1")
            for number, directory in enumerate(setup.adapters)
        )
        directories = {use.digest: directory for use, directory in zip(self._uses, setup.adapters, strict=True)}

        def fetch(digest: str) -> AdapterFiles:
            directory = directories[digest]
            return AdapterFiles(
                digest=digest,
                config=(directory / "adapter_config.json").read_bytes(),
                weights=(directory / "adapter_model.safetensors").read_bytes(),
                base_name=None,
                base_fingerprint=None,
            )

        model = ModelConfig(base=str(setup.base), quantization=quantization, threads=setup.threads)
        # Every round asks the same; answering from the cache would measure nothing.
        self._engine = Engine.build(model, EngineLimits(prefix_cache=False), fetch)

    def run(self, case: Case) -> list[list[int]]:
        """See `Contender.run`."""
        requests = [
            Request(
                id=uuid.uuid4().hex,
                prompt=tuple(self._engine.text.encode(prompt(number))),
                stopping=self._stopping,
                adapters=(self._uses[number % len(self._uses)],) if case.adapters else (),
            )
            for number in range(case.prompts)
        ]
        completions = self._engine.generate(requests)
        for completion in completions:
            if completion.error is not None:
                raise completion.error
        return [list(completion.token_ids) for completion in completions]


def in_bfloat16(setup: Setup) -> LoraplexContender:
    """The base in bfloat16."""
    return LoraplexContender(setup, quantization="none")


def in_nf4(setup: Setup) -> LoraplexContender:
    """The base in NF4, the default."""
    return LoraplexContender(setup, quantization="nf4")
