"""The decode step of a Llama-shaped model by the GPU kernels alone: no engine, no transformers, random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.kernels.gpu import attention, elementwise, nf4
from server.kernels.gpu.lora import LoraSites, lora_begin, scratch
from server.kernels.gpu.lora_plan import DECODE_TOKENS, LoraPlan
from server.kernels.gpu.selfcheck import PAGE, random_weight


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    width: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a layer's four products."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.width, self.hidden),
            "out": (self.hidden, self.heads * self.width),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }

    @property
    def sites(self) -> dict[str, tuple[int, ...]]:
        """Widths of the linears in each product."""
        return {
            "qkv": (self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width),
            "out": (self.hidden,),
            "gate_up": (self.inner, self.inner),
            "down": (self.hidden,),
        }


LLAMA_8B = Shape("8B", 32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_1B = Shape("1B", 16, 2048, 8192, 32, 8, 64, 128256)
TINY = Shape("tiny", 1, 128, 192, 4, 2, 32, 96)


class Step:
    """Everything one decode step of `rows` sequences at `context` tokens reads and runs; weights NF4 or bfloat16."""

    def __init__(
        self, shape: Shape, rows: int, context: int, device: str, *, packed: bool, adapters: int, rank: int = 16
    ) -> None:
        self.shape, self.rows, self.context, self.device = shape, rows, context, device
        self.dtype = torch.bfloat16
        self.x = self._random(rows, shape.hidden)
        self.layers = [self._layer(packed, adapters * rank) for _ in range(shape.layers)]
        self.head: Tensor = self._random(shape.vocabulary, shape.hidden) * shape.hidden**-0.5
        self.norm = torch.ones(shape.hidden, dtype=self.dtype, device=device)
        self.workspace = nf4.Workspace(device)
        self.plan = LoraPlan(device, tokens=DECODE_TOKENS, groups=max(1, rows), pieces=max(1, rows * -(-rank // 16)))
        self.plan.fill(
            [(t, t + 1, t % adapters * rank, t % adapters * rank + rank, 1.0) for t in range(rows * (adapters > 0))]
        )
        pages = -(-context // PAGE)
        self.pages = torch.randperm(rows * pages, device=device).int().view(rows, pages)
        self.lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
        last = self.pages[:, (context - 1) // PAGE].long() * PAGE + (context - 1) % PAGE
        self.slots = last.contiguous()
        angle = torch.rand(rows, shape.width, device=device)
        self.cos, self.sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        self.scratch = attention.DecodeScratch(rows, shape.heads, shape.width, context, device)
        self.h: Tensor | None = None
        if adapters:
            self.h = max((scratch(self.plan, group) for group in self.layers[0]["lora"].values()), key=Tensor.numel)
            self.adapter_bytes = 2 * rank * min(rows, adapters) * shape.layers * self._adapter_columns()

    def _adapter_columns(self) -> int:
        shape = self.shape
        return sum(len(outs) * shape.linears[name][1] + sum(outs) for name, outs in shape.sites.items())

    def _random(self, *size: int) -> Tensor:
        return torch.randn(*size, dtype=self.dtype, device=self.device)

    def _layer(self, packed: bool, arena_rows: int) -> dict[str, Any]:
        shape, pages = self.shape, self.rows * -(-self.context // PAGE)
        layer: dict[str, Any] = {
            "lora": {},
            "norms": [torch.ones(shape.hidden, dtype=self.dtype, device=self.device)] * 2,
        }
        for name, (out, width) in shape.linears.items():
            layer[name] = random_weight(out, width, self.device) if packed else self._random(out, width) * width**-0.5
            if arena_rows:
                sites = shape.sites[name]
                a = [self._random(arena_rows, width) * width**-0.5 for _ in sites]
                b = [self._random(arena_rows, site) * 0.02 for site in sites]
                layer["lora"][name] = LoraSites(a, b)
        layer["k"], layer["v"] = (self._random(shape.kv_heads, pages * PAGE, shape.width) for _ in range(2))
        return layer

    def weight_bytes(self) -> int:
        """Bytes of weights a step reads at least, the head included."""
        return self.head.nbytes + sum(int(layer[name].nbytes) for layer in self.layers for name in self.shape.linears)

    def cache_bytes(self) -> int:
        """Bytes of keys and values a step reads at least."""
        return 2 * 2 * self.rows * self.context * self.shape.kv_heads * self.shape.width * self.shape.layers

    def run(self) -> Tensor:
        """The next tokens [rows]."""
        residual, x = self.x.clone(), torch.zeros_like(self.x)
        for layer in self.layers:
            x = elementwise.rms_norm(x, layer["norms"][0], 1e-5, residual)
            qkv = self._product(layer, "qkv", x)
            seen = attention.decode_new(
                qkv,
                self.cos,
                self.sin,
                self.slots,
                layer["k"],
                layer["v"],
                self.pages,
                self.lengths,
                self.scratch,
                heads=self.shape.heads,
                page_tokens=PAGE,
                scale=self.shape.width**-0.5,
            )
            x = self._product(layer, "out", seen.view(self.rows, -1))
            x = elementwise.rms_norm(x, layer["norms"][1], 1e-5, residual)
            x = self._product(layer, "down", elementwise.silu_mul(self._product(layer, "gate_up", x)))
        x = elementwise.rms_norm(x, self.norm, 1e-5, residual)
        return (x @ self.head.T).argmax(-1)

    def _product(self, layer: dict[str, Any], name: str, x: Tensor) -> Tensor:
        weight = layer[name]
        begun = lora_begin(x, layer["lora"][name], self.plan, self.h) if layer["lora"] else None
        y = nf4.matmul(x, weight, self.workspace) if isinstance(weight, nf4.Nf4Weight) else x @ weight.T
        if begun is not None:
            begun(y)
        return y
