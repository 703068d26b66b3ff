"""A training step without data: what it holds in memory at once and how much it computes.

The real model class, the real adapter layers and the real backward pass run on fake tensors, which have a shape and a
type and no bytes. Every storage that comes to life is counted until it dies, so checkpointing, dropout, casts, saved
activations and the logits are seen where they happen, for any architecture, without a formula for any of them. A base
of any size can be rehearsed from its config.json alone.

What is not seen: the scratch space inside one operation, the allocator's rounding, and the process around it.
"""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from training.recipe import Recipe
from training.trainable import attention_for, float32_adapters, with_adapter

_NF4_BLOCK = 64  # weights that share a scale
_NF4_SCALES_BLOCK = 256  # scales that share a scale, with double quantization


@dataclass(frozen=True)
class Shape:
    """The batch that needs the most memory."""

    rows: int
    length: int  # tokens of each
    label_tokens: int  # of the whole batch: where logits are computed


@dataclass(frozen=True)
class Rehearsal:
    """One optimizer step at `Shape`. Memory in bytes."""

    weights: int  # base and adapter, as they are held
    unpacked: int  # those of a quantized base that stay in the forward's type: embedding, head, norms; else 0
    gradients: int
    optimizer: int  # AdamW's two moments
    peak: int  # the most alive at once, everything together
    logits: int  # those of the batch's labels once, in float32
    linear_flops: int  # of one forward and backward: what grows with the tokens
    attention_flops: int  # what grows with the square of the length
    trained: int  # parameters
    parameters: int

    @property
    def activations(self) -> int:
        """What the peak holds beside weights and optimizer: activations, logits, and the gradients made by then."""
        return self.peak - self.weights - self.optimizer


_SHALLOW, _LESS_SHALLOW = 2, 4  # layers


def rehearse(directory: Path, method: str, recipe: Recipe, shape: Shape, device: str, dtype: torch.dtype) -> Rehearsal:
    """As `rehearse_all_layers`, several times faster where all layers are alike.

    With an adapter every figure grows by the same amount with each layer, so two shallow models tell the deep one's.
    With every weight trained, the peak of a deep model is at another place of the step than a shallow one's.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(str(directory))
    layers = config.num_hidden_layers
    if method == "full" or layers <= _LESS_SHALLOW or len(set(getattr(config, "layer_types", None) or ())) > 1:
        return rehearse_all_layers(directory, method, recipe, shape, device, dtype)
    few, more = (
        rehearse_all_layers(directory, method, recipe, shape, device, dtype, layers=depth)
        for depth in (_SHALLOW, _LESS_SHALLOW)
    )
    grown = (layers - _SHALLOW) / (_LESS_SHALLOW - _SHALLOW)
    return Rehearsal(
        **{name: round(value + grown * (getattr(more, name) - value)) for name, value in asdict(few).items()}
    )


def rehearse_all_layers(
    directory: Path,
    method: str,
    recipe: Recipe,
    shape: Shape,
    device: str,
    dtype: torch.dtype,
    layers: int | None = None,
) -> Rehearsal:
    """Rehearse `method` on the base whose config.json is in `directory`, as `training.finetune` would run it.

    `device` ("cpu" or "cuda") and `dtype` (of the forward) are those of the machine the run is meant for. Raises
    `MethodUnsupported` where the recipe's targets are not there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(str(directory))
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32 if method == "full" else dtype,
            attn_implementation=attention_for(device, recipe.max_length),
        )
        parameters = model.num_parameters()
        unpacked = 0
        if method == "qlora":
            _hold_in_nf4(model, dtype)
            unpacked = _bytes([each for each in model.parameters() if each.dtype != torch.uint8])
        autocast = method == "full" and dtype != torch.float32
        if method != "full":
            model.requires_grad_(False)
            model, slow_layers = with_adapter(model, "", recipe, device)
            autocast = dtype != torch.float32 and slow_layers
            float32_adapters(model)
    model.train()
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal.config.use_cache = False
    if recipe.gradient_checkpointing:
        causal.gradient_checkpointing_enable()
        causal.enable_input_require_grads()
    with FakeTensorMode(), _Watch() as watch:
        _make_fake(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = _bytes([*model.parameters(), *model.buffers()])
        moments = [torch.zeros_like(parameter) for parameter in trained for _ in range(2)]
        if recipe.accumulation > 1:  # gradients of earlier forwards are there already
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        watch.restart()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = _loss(causal, shape, attention_for(device, recipe.max_length), dtype)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = _bytes([parameter.grad for parameter in trained if parameter.grad is not None])
        return Rehearsal(
            weights=weights,
            unpacked=unpacked,
            gradients=gradients,
            optimizer=_bytes(moments),
            peak=watch.peak,
            logits=4 * shape.label_tokens * config.get_text_config().vocab_size,
            linear_flops=watch.linear_flops,
            attention_flops=watch.attention_flops,
            trained=sum(parameter.numel() for parameter in trained),
            parameters=parameters,
        )


def _loss(model: Any, shape: Shape, attention: str, dtype: torch.dtype) -> Tensor:
    """As `training.loss.label_loss`, at given positions: which tokens are labels is data, and there is none."""
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    square = (shape.rows, 1, shape.length, shape.length)
    # Made here, because whether a mask is needed depends on data as well.
    mask = torch.zeros(square, dtype=torch.bool if attention == "sdpa" else dtype)
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    at = torch.zeros(shape.label_tokens, dtype=torch.long)
    chosen = hidden[:, :-1].flatten(0, 1)[at]
    logits = model.get_output_embeddings()(chosen).float() * 1.0
    return functional.cross_entropy(logits, at, reduction="sum")


class _Nf4Product(torch.autograd.Function):
    """y = x W(q)ᵀ, W unpacked for the product and thrown away; nothing but q is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.rows = rows
        return x @ torch.empty(rows, x.shape[-1], dtype=x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = gradients
        (packed,) = ctx.saved_tensors
        return dy @ torch.empty(ctx.rows, packed.numel() * 2 // ctx.rows, dtype=dy.dtype), None, None


class _Nf4Linear(nn.Linear):
    """A linear layer that holds what bitsandbytes' NF4 with double quantization holds."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        count = self.in_features * self.out_features
        self.weight = nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8), requires_grad=False)
        scales = -(-count // _NF4_BLOCK)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(-(-scales // _NF4_SCALES_BLOCK), dtype=torch.float32))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.to(dtype), requires_grad=False)
        self.compute_dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        given = x.dtype
        y = _Nf4Product.apply(x.to(self.compute_dtype), self.weight, self.out_features)  # type: ignore[no-untyped-call]
        y = y if self.bias is None else y + self.bias
        result: Tensor = y.to(given).clone()  # PEFT clones what a 4-bit layer returns
        return result


def _hold_in_nf4(model: Any, dtype: torch.dtype) -> None:
    """Put stand-ins for bitsandbytes' layers where it would put its own: every linear but the output head."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child is not head:
                setattr(module, name, _Nf4Linear(child, dtype))


def _make_fake(model: nn.Module) -> None:
    """Replace every parameter and buffer (on the meta device) by a fake one that says it is on the CPU.

    On the meta device itself autocast does nothing and attention takes another path.
    """
    made: dict[int, Tensor] = {}  # tied weights stay tied

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            values = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = (
                nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
            )
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = fake(tensor)  # type: ignore[assignment]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages alive, and the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = self.linear_flops = self.attention_flops = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        """Forget the peak and the operations so far; what is alive stays counted."""
        self.peak, self.linear_flops, self.attention_flops = self.alive, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        count = flop_registry.get(func._overloadpacket) or _MORE_FLOPS.get(func._overloadpacket)
        if count is not None:
            flops = int(count(*args, **(kwargs or {}), out_val=out))
            if func._overloadpacket in _LINEAR:
                self.linear_flops += flops
            else:
                self.attention_flops += flops
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _addmm_(self: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


_aten = torch.ops.aten
_LINEAR = {_aten.mm, _aten.addmm, _aten.addmm_}
_MORE_FLOPS = {_aten.addmm_: _addmm_}


def _bytes(tensors: list[Tensor]) -> int:
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
