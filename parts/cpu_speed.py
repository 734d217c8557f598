"""What makes models faster on a CPU, and nothing else: without this module the results are the same up to rounding, later.

    model = use_onednn(AutoModelForCausalLM.from_pretrained(...))       # linear layers
    with one_token_at_a_time(model, rows): ...                          # sampling: a pass is over one new token of each row
    fewer_kernels(policy)                                               # LoRA, norms
    with short_sequences(policy): ...                                   # plain attention in bf16
    with attention_to_one(model): ...                                   # the same for a pass over one new token of each row
    most_rows(64, model.device), most_tokens(16384, model.device)       # batches that suit a CPU

`ENABLED = False` switches all of it off. On a GPU all of it does nothing.

Linear layers: MKL, PyTorch's choice for fp32, takes its fast paths on its maker's CPUs only. On AMD's, oneDNN's fp32 product takes half
the time or less, at the same precision (`benchmarks/bench_linear.py`). Half precision goes to oneDNN anyway; what sampling saves there is the
copy of the weights into oneDNN's layout, which costs as much as a product of 16 rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENABLED = True
ROWS = 96  # that are sampled at a time: products of more rows take as long a row, and the cache grows
LARGEST_SCORE = 32.0  # of attention: beyond it bf16's rounding is more than 0.06 nats
# Options of attention that its mask or its caller sees to.
NO_MATTER = {"position_ids", "cache_position", "past_key_values", "use_cache", "sliding_window", "is_causal", "output_attentions",
             "output_hidden_states", "output_router_logits", "return_dict", "position_embeddings"}  # fmt: skip
TOKENS = 1024  # in a forward pass without gradients: that many keep a CPU busy, and more fall out of its caches

Model = TypeVar("Model", bound=nn.Module)


# ---------------------------------------------------------------------------------------------------------------- batches


def most_rows(rows: int, device: torch.device) -> int:
    """How many rows to sample at a time: `rows`, on a CPU at most `ROWS`."""
    return min(rows, ROWS) if ENABLED and device.type == "cpu" else rows


def most_tokens(tokens: float, device: torch.device) -> float:
    """How many tokens to score in a batch: `tokens`, on a CPU at most `TOKENS`."""
    return min(tokens, TOKENS) if ENABLED and device.type == "cpu" else tokens


# ---------------------------------------------------------------------------------------------------------- linear layers


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD CPU and PyTorch comes with both libraries. Decided by name: a timing would differ from run to run."""
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    return amd and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def _by_onednn(weight: torch.Tensor) -> bool:
    """Whether oneDNN shall multiply by `weight`: frozen fp32 on a CPU where that is faster."""
    return ENABLED and weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.requires_grad and onednn_is_faster()


def _can_be_packed(weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies by `weight` anyway, so that a copy in its own layout saves it the same copy at every call."""
    half = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return _by_onednn(weight) or (ENABLED and half and not weight.requires_grad)


class _Product(torch.autograd.Function):
    """x @ weight.T + bias with a gradient for x alone."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return torch.ops.mkldnn._linear_pointwise(gradient.contiguous(), weight.t(), None, "none", [], ""), None, None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, through oneDNN for frozen fp32 weights on a CPU where that is faster."""
    if x.dtype == weight.dtype and x.device == weight.device and _by_onednn(weight):
        return _Product.apply(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


class OneDNNLinear(nn.Linear):
    """`nn.Linear` by `linear`, or by a copy of its weight in oneDNN's own layout while it has one."""

    packed: torch.Tensor | None = None

    def pack(self, weight: torch.Tensor, rows: int) -> None:
        """Compute with `weight` in place of the layer's own, laid out for `rows` rows at a time, until `unpack`."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)

    def unpack(self) -> None:
        self.packed = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return linear(x, self.weight, self.bias)


def use_onednn(model: Model) -> Model:
    """Let the linear layers of a model go through `linear`; layers that are trained, or on a GPU, compute as before."""
    if ENABLED and torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear
    return model


# ------------------------------------------------------------------------------------------------- frozen norms, trained LoRA


class _NoGraph:
    """In place of a function's context, where there are no gradients: recording costs as much as a small kernel."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        pass


def _apply(function: type[torch.autograd.Function], *inputs: object) -> torch.Tensor:
    return function.apply(*inputs) if torch.is_grad_enabled() else function.forward(_NoGraph(), *inputs)


class _RMSNorm(torch.autograd.Function):
    """weight * (x / root of the mean square), as transformers writes it, with a gradient for x alone in a third of the kernels."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        by_normed, wide = (gradient * weight).float(), x.float()
        mean = (by_normed * wide).mean(dim=-1, keepdim=True)
        return by_normed.mul_(scale).addcmul_(wide, mean * scale**3, value=-1).to(x.dtype), None, None


class _LoRA(torch.autograd.Function):
    """base + scaling * x A^T B^T in fp32, with base's dtype: as PEFT computes it, keeping x alone and in fewer kernels."""

    @staticmethod
    def forward(ctx, base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        low = x.flatten(0, -2).float() @ a.t()
        ctx.scaling = scaling
        ctx.save_for_backward(x, a, b, low)
        return torch.addmm(base.flatten(0, -2).float(), low, b.t(), alpha=scaling).to(base.dtype).view(base.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, a, b, low = ctx.saved_tensors
        wide = gradient.flatten(0, -2).float()
        by_low = (wide @ b).mul_(ctx.scaling)
        by_x = (by_low @ a).to(x.dtype).view(x.shape) if ctx.needs_input_grad[1] else None
        return gradient, by_x, by_low.t() @ x.flatten(0, -2).float(), (wide.t() @ low).mul_(ctx.scaling), None


class _Gated(torch.autograd.Function):
    """activation(gate) * up, which keeps these two: the activation is computed again in the backward pass. The same kernels otherwise."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor, activation: nn.Module) -> torch.Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation(gate) * up

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.activation(gate)
        (by_gate,) = torch.autograd.grad(active, gate, gradient * up)
        return by_gate, active.detach().mul_(gradient), None


def _norm(module: nn.Module, eps: float, x: torch.Tensor) -> torch.Tensor:
    if ENABLED and not module.weight.requires_grad and x.device.type == "cpu" and x.dtype == module.weight.dtype:
        return _apply(_RMSNorm, x, module.weight, eps)
    return type(module).forward(module, x)


def _lora(module: nn.Module, x: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
    name = module.active_adapters[0] if len(module.active_adapters) == 1 else None
    plain = not (args or options or module.disable_adapters or module.merged or module.lora_variant) and name in module.lora_A
    if not (ENABLED and plain and x.device.type == "cpu") or torch.is_autocast_enabled("cpu"):
        return type(module).forward(module, x, *args, **options)
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if a.bias is not None or b.bias is not None or a.weight.dtype != torch.float32 or (dropout.training and getattr(dropout, "p", 0)):
        return type(module).forward(module, x)
    return _apply(_LoRA, module.base_layer(x), x, a.weight, b.weight, module.scaling[name])


def _gated(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if ENABLED and x.device.type == "cpu":
        return module.down_proj(_apply(_Gated, module.gate_proj(x), module.up_proj(x), module.act_fn))
    return type(module).forward(module, x)


def fewer_kernels(model: Model) -> Model:
    """Let a model's frozen RMS norms and its LoRA layers take fewer kernels on a CPU, wherever they compute what is known here.

    Gated layers keep less for the backward pass.
    """
    from peft.tuners.lora import Linear

    for module in model.modules() if ENABLED else ():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if type(module) is Linear:
            module.forward = functools.partial(_lora, module)
        elif type(module).__name__.endswith("RMSNorm") and isinstance(eps, float) and _is_plain_norm(module, eps):
            module.forward = functools.partial(_norm, module, eps)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")) and _is_gated(module):
            module.forward = functools.partial(_gated, module)
    return model


@torch.no_grad()
def _is_gated(module: nn.Module) -> bool:
    """Whether a layer is down(activation(gate(x)) * up(x)) to the bit, tried on a few numbers, and its activation has no weights."""
    weight = getattr(module.gate_proj, "weight", None)
    if weight is None or weight.device.type != "cpu" or not weight.is_floating_point():
        return False
    if any(True for _ in getattr(module.act_fn, "parameters", tuple)()):
        return False
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        return torch.equal(_gated(module, x), type(module).forward(module, x))
    except (RuntimeError, TypeError, ValueError):  # it takes something else
        return False


@torch.no_grad()
def _is_plain_norm(module: nn.Module, eps: float) -> bool:
    """Whether a norm computes `_RMSNorm`, tried on numbers around `eps` too."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.device.type != "cpu" or weight.requires_grad or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(3, len(weight), generator=draw) * torch.tensor([[1.0], [30.0], [eps**0.5]])).to(weight.dtype)
    expected = module(x)
    close = 1e-5 if weight.dtype == torch.float32 else 1e-2
    return expected.dtype == x.dtype and torch.allclose(_RMSNorm.apply(x, weight, eps), expected, rtol=close, atol=close * 1e-2)


# -------------------------------------------------------------------------------------------------------------- attention


def configs_of(model: nn.Module, attention: str) -> list:
    """The configurations inside a model that say `attention`."""
    from transformers import PreTrainedModel

    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    return [config for config in configs.values() if config._attn_implementation == attention]


@contextmanager
def attention_by(model: nn.Module, kind: str) -> Iterator[None]:
    """While the block runs, a model's fused attention is of another `kind` of transformers'."""
    configs = configs_of(model, "sdpa")
    try:
        for config in configs:
            config._attn_implementation = kind
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


def _is_half_on_cpu(model: nn.Module) -> bool:
    weight = next(model.parameters())
    return ENABLED and weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def _has_fast_half(model: nn.Module) -> bool:
    return _is_half_on_cpu(model) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def short_sequences(model: nn.Module) -> Iterator[None]:
    """While the block runs, attention is plain products in half precision on a CPU.

    There the backward pass of PyTorch's fused attention takes a fifth of a PPO step of short sequences.
    """
    with attention_by(model, "eager" if _is_half_on_cpu(model) else "sdpa"):
        yield


def _attention_to_one(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """transformers' `sdpa_attention_forward`, with plain products where each row asks for one token.

    In bf16 the fused kernel takes twice as long for one token, since it brings all keys and values into another layout first. But plain
    products round scores to bf16, where it does not: large ones, of Qwen2 for example, are left to it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, asked, size = query.shape
    strange = dropout or any(value is not None and name not in NO_MATTER for name, value in options.items())
    mask = attention_mask
    fused = functools.partial(sdpa_attention_forward, module, query, key, value, mask, scaling=scaling, dropout=dropout, **options)
    if asked != 1 or strange or (mask is not None and (mask.dtype != torch.bool or mask.shape[1:3] != (1, 1))):
        return fused()
    groups = key.shape[1]
    queries = query.reshape(rows * groups, heads // groups, size)
    # Keys come first: with the few queries of a group on the right the product reads them as fast as memory gives them.
    scores = torch.bmm(key.flatten(0, 1), queries.transpose(1, 2)).transpose(1, 2).contiguous().float()
    scores *= size**-0.5 if scaling is None else scaling
    if scores.dtype != key.dtype and not max(scores.amax(), -scores.amin()) <= LARGEST_SCORE:
        return fused()
    if mask is not None:
        scores.view(rows, heads, -1).masked_fill_(~mask[:, 0], -torch.inf)
    return torch.bmm(scores.softmax(dim=-1).to(value.dtype), value.flatten(0, 1)).view(rows, 1, heads, -1), None


@contextmanager
def attention_to_one(model: nn.Module) -> Iterator[None]:
    """While the block runs, a pass over one new token of each row attends by plain products, in bf16 on a CPU that has it.

    The function changes, not its name in the configuration: models ask for that name to choose a mask or a way of their own.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not _has_fast_half(model) or ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:  # somebody else's, or ours already
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention_to_one
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


@contextmanager
def one_token_at_a_time(model: PreTrainedModel, rows: int) -> Iterator[None]:
    """While the block runs, passes over one new token of each of `rows` rows take least time; longer passes give the same results.

    Weights are copied into oneDNN's own layout where oneDNN computes: they may change before the block, not inside it.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, OneDNNLinear) and _can_be_packed(layer.weight)]
    try:
        for layer in layers:
            layer.pack(layer.weight.data, rows)
        yield
    finally:
        for layer in layers:
            layer.unpack()
