"""vLLM's `vllm.lora.request`, for tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoRARequest:
    name: str
    number: int
    path: str
