"""vLLM's `vllm.platforms`, for tests."""

from types import SimpleNamespace

current_platform = SimpleNamespace(is_cpu=lambda: False)
