"""Evaluation through the server's own engine: what is scored is what will be served."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from hub.errors import HubError
from hub.facade import HubFacade
from hub.facts import FACTS_FILE, Facts, corrects_nf4
from hub.kinds import check_adapter
from hub.refs import AdapterRef
from server.adapters.weights import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from server.engine.engine import Engine
from server.engine.offline import Completion
from server.engine.request import AdapterUse, FinishReason, Request, Stopping
from server.errors import InvalidRequest
from training.errors import GenerationFailed
from training.evaluate import Prompt


@dataclass(frozen=True)
class Adapters:
    """The adapters of an evaluation: by the name the caller used, and their files by digest."""

    uses: Mapping[str, AdapterUse]
    files: Mapping[str, AdapterFiles]

    def fetch(self, digest: str) -> AdapterFiles:
        """What the engine asks for."""
        return self.files[digest]


def is_adapter_directory(name: str) -> bool:
    """Whether `name` is a PEFT directory on this machine rather than a reference."""
    return (Path(name) / CONFIG_FILE).is_file()


def find_adapters(names: Sequence[str], hub: HubFacade | None) -> Adapters:
    """Each name as an adapter: a directory where there is one of that name, else a reference into `hub`.

    Raises `hub.errors.HubError` for what is neither, or is no adapter.
    """
    uses: dict[str, AdapterUse] = {}
    files: dict[str, AdapterFiles] = {}
    for name in names:
        if is_adapter_directory(name):
            found = _from_directory(Path(name))
            uses[name] = AdapterUse(found.digest, name)
        else:
            if hub is None:
                raise HubError(f"{name} is no adapter directory, and no hub was given")
            version = hub.resolve(AdapterRef.parse(name))
            check_adapter(version)
            base = version.manifest.base
            found = AdapterFiles(
                digest=version.digest,
                config=hub.read_file(version, CONFIG_FILE),
                weights=hub.read_file(version, WEIGHTS_FILE),
                base_name=base.name,
                base_fingerprint=base.fingerprint,
                corrects_nf4=corrects_nf4(version.manifest.recipe),
            )
            uses[name] = AdapterUse(version.digest, version.text)
        files[found.digest] = found
    return Adapters(uses, files)


class EngineGenerator:
    """A `Generator` over an engine whose fetch is `adapters.fetch`."""

    def __init__(self, engine: Engine, adapters: Mapping[str, AdapterUse]) -> None:
        self._engine = engine
        self._adapters = adapters
        self._ids = count()
        self.cut_off: Counter[str | None] = Counter()  # answers by model that ended at their `max_new_tokens`

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self._engine.text.encode(text))

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers; see `Generator`."""
        return [done.text for done in self._completions(prompts)]

    def ended(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """The same; None for an answer that `max_new_tokens` cut off."""
        cut = FinishReason.LENGTH
        return [None if done.finish_reason is cut else done.text for done in self._completions(prompts)]

    def _completions(self, prompts: Sequence[Prompt]) -> list[Completion]:
        found = self._engine.generate(self._requests(prompts))
        for prompt, done in zip(prompts, found, strict=True):
            if done.error is not None:
                raise GenerationFailed(f"{prompt.adapter or 'base'}: {done.error}") from done.error
            self.cut_off[prompt.adapter] += done.finish_reason is FinishReason.LENGTH
        return found

    def _requests(self, prompts: Sequence[Prompt]) -> list[Request]:
        """All of them, so that one that cannot be answered is known before any is."""
        rendered = [self._rendered(prompt) for prompt in prompts]
        check_room(prompts, [len(ids) for ids in rendered], self._engine.base.context_tokens)
        return [
            Request(
                id=f"eval-{next(self._ids)}",
                prompt=ids,
                stopping=Stopping(max_new_tokens=prompt.max_new_tokens),
                adapters=(self._adapters[prompt.adapter],) if prompt.adapter is not None else (),
            )
            for prompt, ids in zip(prompts, rendered, strict=True)
        ]

    def _rendered(self, prompt: Prompt) -> tuple[int, ...]:
        try:
            return tuple(self._engine.text.render_chat([message.as_dict() for message in prompt.messages]))
        except InvalidRequest as error:
            raise GenerationFailed(f"{_named(prompt)}: {error}") from error


def check_room(prompts: Sequence[Prompt], tokens: Sequence[int], context: int) -> None:
    """Raise `GenerationFailed`, naming the question, where a prompt of so many `tokens` and its answer do not fit."""
    long = {
        _named(prompt): (count, prompt.max_new_tokens)
        for prompt, count in zip(prompts, tokens, strict=True)
        if count + prompt.max_new_tokens > context
    }
    if long:
        name, (count, answer) = next(iter(long.items()))
        more = f", nor do {len(long) - 1} more" if len(long) > 1 else ""
        raise GenerationFailed(
            f"{name}: a prompt of {count} tokens and an answer of {answer} do not fit the base's context of "
            f"{context}{more}; shorten such questions or take them out"
        )


def _named(prompt: Prompt) -> str:
    return prompt.label or f"the question {prompt.messages[-1].content[:60]!r}"


def _from_directory(directory: Path) -> AdapterFiles:
    config = (directory / CONFIG_FILE).read_bytes()
    weights = (directory / WEIGHTS_FILE).read_bytes()
    told = directory / FACTS_FILE
    facts = Facts.parse(told.read_bytes()) if told.is_file() else Facts()
    base = facts.base
    return AdapterFiles(
        digest="sha256:" + hashlib.sha256(config + weights).hexdigest(),
        config=config,
        weights=weights,
        base_name=base.name if base else None,
        base_fingerprint=base.fingerprint if base else None,
        corrects_nf4=corrects_nf4(facts.recipe),
    )
