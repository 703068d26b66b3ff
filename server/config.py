"""The server's settings: frozen, built once at the edge, every limit a named field with its unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Quantization = Literal["nf4", "int8", "none"]
MIB = 1024 * 1024


@dataclass(frozen=True)
class ModelConfig:
    """Which base is loaded and how."""

    base: str = "smollm2-135m"  # built-in name, local directory, or hub id "org/name[@revision]"
    quantization: Quantization = "nf4"
    dtype: str = "bfloat16"  # "bfloat16", "float32" or "float16": activations and unquantized weights
    device: str = "cpu"  # "cpu" or "cuda[:n]"
    threads: int = 0  # CPU threads for torch; 0 = all cores


@dataclass(frozen=True)
class EngineLimits:
    """What the engine may hold at once."""

    max_sequences: int = 64  # sequences in one step
    max_batch_tokens: int = 512  # tokens in one step, prompts and decodes together
    max_waiting: int = 1024  # requests queued for admission
    max_waiting_per_tenant: int = 768  # of those, how many one tenant may have
    kv_memory_bytes: int = 512 * MIB
    page_tokens: int = 16  # tokens in one KV page
    prefix_cache: bool = True  # keep finished pages for requests that begin the same with the same adapters
    adapter_memory_bytes: int = 512 * MIB  # arena rows on the device
    adapter_parts_memory_bytes: int = 256 * MIB  # on the device, for what adapters bring beside LoRA rows
    host_adapter_memory_bytes: int = 2048 * MIB  # parsed adapters in host memory
    device_memory_bytes: int = 0  # for all of it: weights, pages, adapters, workspace; 0: what is free
    adapter_fetches: int = 8  # adapters fetched from the hub and parsed at once
    max_adapter_rank: int = 256
    max_adapters_per_request: int = 8
    deterministic: bool = False  # a request's bits do not depend on what shares its batch; slower


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for."""

    default_max_new_tokens: int = 256
    max_stop_strings: int = 16
    max_stop_string_chars: int = 128
    max_stop_token_ids: int = 64
    max_logprobs: int = 20
    max_logit_bias: int = 300
    max_structure_chars: int = 64 * 1024  # of a JSON schema, a regex, a grammar or all choices
    max_choices: int = 1024
    max_samples: int = 16  # answers to one request
    max_message_bytes: int = 4 * MIB
    max_metadata_bytes: int = 16 * 1024


@dataclass(frozen=True)
class FeedbackConfig:
    """Where marks of answers are kept, and what of the answers is remembered until then."""

    directory: Path
    retention_seconds: float = 30 * 86400.0  # a day's marks are removed so long after its end
    window_seconds: float = 900.0  # how long after its answer a request can be marked
    max_tenant_bytes: int = 256 * MIB  # of one tenant's marks on disk
    max_answers: int = 4096  # remembered
    max_answer_bytes: int = 64 * MIB  # of memory, for all remembered
    max_pending: int = 64  # marks on their way to the disk
    max_correction_chars: int = 64 * 1024
    max_comment_chars: int = 1000


@dataclass(frozen=True)
class ServerConfig:
    """Everything `hub serve` was told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineLimits = field(default_factory=EngineLimits)
    requests: RequestLimits = field(default_factory=RequestLimits)
    hub: str | None = None  # hub URL; None = LORAPLEX_HUB or the local default
    listen: str = "127.0.0.1:50051"
    metrics_port: int = 9400  # 0 = any free port; negative = off
    drain_seconds: float = 30.0  # time for running requests after SIGTERM
    lease_seconds: float = 600.0  # of the leases on held versions, renewed at half of it; 0 = none
    tenant_header: str | None = None  # metadata key that names a call's tenant; None: all callers are one
    feedback: FeedbackConfig | None = None  # None: no answer can be marked, and none is remembered
    routers: tuple[tuple[str, Path], ...] = ()  # (name, directory) of what chooses for requests with `auto`
    trusted_keys: tuple[Path, ...] = ()  # files of public keys; none: adapters need no signature
