"""The engine's nouns. Imports nothing of ours.

Everything here is validated: whoever builds a `Request` (the gRPC front, the offline door) has already
turned outside input into these values, and the engine relies on what the field comments promise.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


class FinishReason(enum.Enum):
    """Why a request ended well."""

    STOP = "stop"
    LENGTH = "length"
    STOP_STRING = "stop_string"


@dataclass(frozen=True)
class AdapterUse:
    """One adapter of a request, resolved to a digest at admission; names play no part after that."""

    digest: str  # "sha256:<64 hex>", the manifest's digest
    version: str  # "team/sentiment@3", for people and metrics
    weight: float = 1.0  # finite; factor on the adapter's delta

    @property
    def name(self) -> str:
        """The name without the version, the label that metrics use."""
        return self.version.rpartition("@")[0] or self.version


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 0.0  # >= 0; 0 is greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0  # [0, 1)
    seed: int = 0  # always set: the front draws one when the caller gave none
    repetition_penalty: float = 1.0  # > 0
    presence_penalty: float = 0.0  # [-2, 2]
    frequency_penalty: float = 0.0  # [-2, 2]
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids inside the vocabulary


@dataclass(frozen=True)
class Stopping:
    """When an answer ends."""

    max_new_tokens: int  # >= 1; prompt + max_new_tokens fits the context
    min_new_tokens: int = 0  # <= max_new_tokens
    ignore_eos: bool = False
    stop_strings: tuple[str, ...] = ()  # none empty
    stop_token_ids: tuple[int, ...] = ()


StructureKind = Literal["json_schema", "regex", "grammar", "choice"]


@dataclass(frozen=True)
class Structure:
    """What an answer's text must be; compiled once by `server.engine.structure`, which checks it too."""

    kind: StructureKind
    text: str = ""  # a JSON Schema as JSON, a regular expression, or a Lark grammar
    choices: tuple[str, ...] = ()  # of the kind "choice" only


@dataclass(frozen=True)
class Request:
    """One generation, ready to run."""

    id: str
    prompt: tuple[int, ...]  # >= 1 token ids inside the vocabulary
    stopping: Stopping
    sampling: Sampling = Sampling()
    adapters: tuple[AdapterUse, ...] = ()  # empty: the base; digests distinct
    logprobs: int | None = None  # None: no log-probabilities; n >= 0: the chosen token's and the n best
    structure: Structure | None = None
    arrival: float = field(default_factory=time.monotonic)  # seconds
    tenant: str = ""  # whose share of the server it uses; "" is everybody who has no name
    # Set: the prompt is only read, by the base alone, and what comes back is the mean of its hidden states after so
    # many layers instead of an answer. The engine has been told of the layer before (`Engine.reads`).
    read_layer: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one position: before temperature and filters, after penalties, bias, structure."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # best first


@dataclass(frozen=True)
class Usage:
    """What a request consumed."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timing:
    """Seconds since the request's arrival."""

    queue: float  # until its first step
    first_token: float
    total: float


@dataclass(frozen=True)
class Finish:
    """The end of an answer that went well."""

    reason: FinishReason
    usage: Usage
    timing: Timing


@dataclass
class Delta:
    """What is new of one answer since the reader last looked.

    `error`, `finish` and `embedding` exclude each other; either one means nothing follows.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    finish: Finish | None = None
    error: Exception | None = None
    embedding: Tensor | None = None  # [hidden] float32, finite: all there is where the prompt was only read

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.error is not None or self.embedding is not None
