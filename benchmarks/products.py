"""What a model's matrix products take by themselves here: beside it, the time of anything that the model does says what the rest costs.

with Products() as products:
    work()
products.seconds()      # of these products alone, each layer at the rate measured now
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

LEAST = 64  # features on either side: heads of one label and LoRA's matrices are no products to keep a machine busy


@torch.no_grad()
def layer_seconds(layers: Sequence[nn.Linear], tokens: Sequence[int], clock: Callable[[], float] = time.process_time) -> list[float]:
    """Seconds of each layer over as many tokens, one layer after another as in a model: the least of three times."""
    states = [torch.randn(count, layer.in_features).to(layer.weight) for layer, count in zip(layers, tokens)]
    times: list[list[float]] = [[] for _ in layers]
    for _ in range(4):  # the first one warms up
        for layer, state, own in zip(layers, states, times):
            start = clock()
            layer(state)
            own.append(clock() - start)
    return [min(own[1:]) for own in times]


def products_rate(model: nn.Module, tokens: int, clock: Callable[[], float]) -> float:
    """Floating-point operations a second of a model's frozen linear layers, one product after another, over `tokens` at a time."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and not layer.weight.requires_grad]
    return 2 * tokens * sum(layer.weight.numel() for layer in layers) / sum(layer_seconds(layers, [tokens] * len(layers), clock))


class Products:
    """While the block runs, counts what goes through linear layers, whatever model they are in, and the CPU seconds of all of it."""

    def __enter__(self) -> Products:
        self.calls: dict[nn.Linear, list[int]] = {}
        self.hook = nn.modules.module.register_module_forward_hook(self._count)
        self.start = time.process_time()
        return self

    def __exit__(self, *raised: object) -> None:
        self.spent = time.process_time() - self.start
        self.hook.remove()

    def _count(self, layer: nn.Module, given: tuple, found: object) -> None:
        if isinstance(layer, nn.Linear) and min(layer.weight.shape) >= LEAST:
            self.calls.setdefault(layer, []).append(given[0].numel() // layer.in_features)

    @property
    def operations(self) -> int:
        return sum(2 * layer.weight.numel() * sum(tokens) for layer, tokens in self.calls.items())

    def seconds(self) -> float:
        """CPU seconds that these products take by themselves, measured on as many tokens as a call had on average."""
        means = [round(sum(tokens) / len(tokens)) for tokens in self.calls.values()]
        times = layer_seconds(list(self.calls), means)
        return sum(own * sum(tokens) / mean for own, tokens, mean in zip(times, self.calls.values(), means))

    def __str__(self) -> str:
        alone = self.seconds()
        return (
            f"{self.spent:.1f} CPU seconds, products alone {alone:.1f} ({alone / self.spent:.0%}), {self.operations / alone / 1e9:.0f} "
            "billion operations a second"
        )
