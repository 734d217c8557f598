"""vLLM's `vllm.lora`, for tests."""
