"""fp32 linear layers: PyTorch's own product against oneDNN's, at the shapes of a small model, in turn in one process.

python benchmarks/bench_linear.py
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from parts.cpu_speed import OneDNNLinear, onednn_is_faster


def seconds(layer: torch.nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(20):
        layer(x)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    if not onednn_is_faster():
        print("this is no AMD CPU: linear layers stay PyTorch's own")
        return
    for width, wide in ((576, 1536), (1536, 576), (576, 49152)):
        for rows in (1, 16, 256):
            x = torch.randn(rows, width)
            own = torch.nn.Linear(width, wide, bias=False)
            layers = {"as it lies": OneDNNLinear(width, wide, bias=False), "packed": OneDNNLinear(width, wide, bias=False)}
            for layer in layers.values():
                layer.load_state_dict(own.state_dict())
                layer.requires_grad_(False)
            layers["packed"].pack(own.weight, rows)
            seconds(own, x)
            for name, layer in layers.items():
                ratios = [seconds(own, x) / seconds(layer, x) for _ in range(5)]
                print(
                    f"{rows:>4} x {width} -> {wide}, {name}: {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
                )


if __name__ == "__main__":
    main()
