"""A GPU that is not there: tensors that say they are on one and compute on the CPU. What mixes them with the CPU's own is an error, as there.

    with pretend_gpu():
        model.to("cuda")(torch.tensor([[5, 6]], device="cuda"))

PyTorch itself sees tensors of the CPU. So kernels, and what PyTorch does on a GPU alone, are not what this shows.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
INDEXED = {getattr(torch.ops.aten, name) for name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")}
PARSED = torch._C._nn._parse_to


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    data = property(lambda self: OnGPU(self.own), lambda self, value: setattr(self, "own", value.own))

    @staticmethod
    def __new__(cls, own: torch.Tensor) -> OnGPU:
        sizes = {"strides": own.stride(), "storage_offset": own.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, own.size(), dtype=own.dtype, device="cpu", **sizes)

    def __init__(self, own: torch.Tensor) -> None:
        self.own = own

    def __repr__(self) -> str:
        return f"OnGPU({self.own})"

    def tolist(self) -> list:
        return self.own.tolist()

    def numpy(self) -> None:
        raise TypeError("can't convert a tensor on a GPU to numpy")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        # A tensor without dimensions is as good as a number; indices may come from the CPU.
        others = [value for value in tensors if not isinstance(value, OnGPU) and value.dim()]
        if func.overloadpacket in INDEXED and isinstance(args[0], OnGPU):
            indices = [value for value in args[1] if value is not None]
            others = [value for value in others if not any(value is index for index in indices)]
        if others and func is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found the CPU's {tuple(others[0].shape)} too")
        found = func(*inside(args), **inside(kwargs))
        return outside(found, tensors, isinstance(tensors[0], OnGPU))


def inside(value):
    return tree_map(lambda leaf: leaf.own if isinstance(leaf, OnGPU) else leaf, value)


def outside(found, given: list[torch.Tensor], there: bool = True):
    """Results on the GPU; what an operation changed in place is the tensor that it was."""
    known = {id(value.own): value for value in given if isinstance(value, OnGPU)}

    def wrap(value):
        if id(value) in known:
            return known[id(value)]
        return OnGPU(value) if there and isinstance(value, torch.Tensor) and not isinstance(value, OnGPU) else value

    return tree_map(wrap, found)


class pretend_gpu(TorchFunctionMode):  # noqa: N801, a context
    """While the block runs, tensors can be made on "cuda" and moved there and back, and models too."""

    def __enter__(self):
        self.own_to = own_to = nn.Module.to

        def to(model: nn.Module, *args, **kwargs) -> nn.Module:
            device, dtype, *_ = PARSED(*args, **kwargs)
            if device is None or device.type != "cuda":
                return own_to(model, *args, **kwargs)
            return move(model if dtype is None else own_to(model, dtype))

        nn.Module.to = to
        return super().__enter__()

    def __exit__(self, *raised):
        nn.Module.to = self.own_to
        super().__exit__(*raised)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return moved(func, *args, **kwargs)
        if func is torch._C._nn.pad_sequence and isinstance(args[0][0], OnGPU):  # it makes its table on the device that PyTorch sees
            return OnGPU(func(inside(args[0]), *args[1:], **kwargs))
        device = kwargs.get("device")
        if device is None or not isinstance(device, str | torch.device):
            return func(*args, **kwargs)
        there = torch.device(device).type == "cuda"
        kwargs["device"] = CPU if there else device
        if any(isinstance(value, OnGPU) for value in tree_leaves(args)):  # new_zeros and the like
            return outside(func(*inside(args), **inside(kwargs)), [], there)
        found = func(*args, **kwargs)
        return OnGPU(found.detach()) if there else found


def moved(func, tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """`to`, `cpu` and `cuda`; gradients come back to where they belong."""
    if func is not torch.Tensor.to:
        device, dtype = (CPU if func is torch.Tensor.cpu else GPU), None
    elif args and isinstance(args[0], torch.Tensor):
        device, dtype = args[0].device, args[0].dtype
    else:
        device, dtype, *_ = PARSED(*args, **{name: value for name, value in kwargs.items() if name != "copy"})
    if dtype is not None and dtype != tensor.dtype:
        tensor = torch.ops.aten._to_copy(tensor, dtype=dtype)
    there = isinstance(tensor, OnGPU)
    if device is None or (device.type == "cuda") == there:
        return tensor.clone() if kwargs.get("copy") else tensor
    return _Moved.apply(tensor)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.own.clone() if isinstance(tensor, OnGPU) else OnGPU(tensor.clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.own.clone() if isinstance(gradient, OnGPU) else OnGPU(gradient.clone())


def move(model: nn.Module) -> nn.Module:
    """The model on the GPU; weights that were the same tensor stay so."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and not isinstance(weight, OnGPU):
                moved = known.setdefault(id(weight), nn.Parameter(OnGPU(weight.data), requires_grad=weight.requires_grad))
                module._parameters[name] = moved
        for name, table in module._buffers.items():
            module._buffers[name] = table if table is None or isinstance(table, OnGPU) else OnGPU(table)
    return model
