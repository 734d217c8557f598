"""Linear layers through oneDNN on CPUs where MKL, PyTorch's choice for fp32, runs at a fraction of the machine's speed.

    model = use_onednn(AutoModelForCausalLM.from_pretrained(...))

MKL takes its fast paths on its maker's CPUs only: on AMD's, oneDNN's fp32 product takes half the time or less, at the same precision
(`benchmarks/bench_linear.py`). Half precision goes to oneDNN anyway, and a GPU knows nothing of this.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD CPU and PyTorch comes with both libraries. Decided by name: a timing would differ from run to run."""
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    return amd and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


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
    if x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and not weight.requires_grad and onednn_is_faster():
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

    def packable(self) -> bool:
        """Whether `pack` can be: frozen fp32 weights on a CPU."""
        return self.weight.dtype == torch.float32 and self.weight.device.type == "cpu" and not self.weight.requires_grad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return linear(x, self.weight, self.bias)


def use_onednn(model: Model) -> Model:
    """Let the linear layers of a model go through `linear`; layers that are trained, or on a GPU, compute as ever."""
    if onednn_is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear
    return model
