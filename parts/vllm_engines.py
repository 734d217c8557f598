"""vLLM in the place of `sampling.sample`: rollouts of adapters on one base model, and those of a policy that PPO trains.

On a GPU a response depends on its seed alone, though vLLM draws it otherwise than `sample` does. Its CPU build has no draws by row: there a
whole call repeats, and a resumed one need not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parts.adapters import VLLM_RANKS
from parts.files import read_json
from parts.models import loading
from parts.sampling import Decoding, row_seed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from vllm import LLM, SamplingParams

MEMORY = Path("/dev/shm")  # where a folder is in memory
CPU_MEMORY = 0.5  # the share of a machine's memory that evaluation's engine takes there
SLICE = 1024  # responses that vLLM draws before they are kept: an interruption loses no more


def load_vllm(model: str, dtype: str, length: int, rank: int, **options: object) -> LLM:
    """vLLM's engine for a base model and LoRA of up to `rank`, 0 for none.

    Args:
        dtype: "float32", "bfloat16"; empty means what the model says.
        length: of prompt and response together, in tokens; at most the model's own.
        options: of `vllm.LLM`.
    """
    from transformers import AutoConfig
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu():  # where vLLM would ask for nearly all of the machine's memory, and what is in use already is not free
        options.setdefault("gpu_memory_utilization", CPU_MEMORY)
    with loading(model, "a model for vLLM"):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
        length = min(length, getattr(config, "max_position_embeddings", length))
        most = next(size for size in VLLM_RANKS if size >= rank)
        return LLM(model=model, dtype=dtype or "auto", enable_lora=rank > 0, max_lora_rank=most, max_model_len=length, **options)


def sampling_settings(decoding: Decoding, seeds: Sequence[int], ends: Collection[int], **options: object) -> list[SamplingParams]:
    """vLLM's settings of a request for each seed."""
    from vllm import SamplingParams
    from vllm.platforms import current_platform

    return [
        SamplingParams(
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k or -1,
            seed=None if current_platform.is_cpu() else seed,
            stop_token_ids=sorted(ends),
            skip_special_tokens=False,
            **options,
        )
        for seed in seeds
    ]


class VLLMEngine:
    """Rollouts of adapters on one base model by vLLM (`requirements/vllm.txt`): one engine, one LoRA per checkpoint."""

    name = "vllm"

    def __init__(self, base: str, tokenizer: PreTrainedTokenizerBase, adapters: Sequence[str], max_length: int, dtype: str = "") -> None:
        ranks = [read_json(Path(adapter) / "adapter_config.json")["r"] for adapter in adapters]
        self.engine = load_vllm(base, dtype, max_length, max(ranks, default=0))
        self.tokenizer = tokenizer
        self.numbers = {adapter: number for number, adapter in enumerate(adapters, start=1)}

    @property
    def dtype(self) -> str:
        return str(self.engine.llm_engine.model_config.dtype).removeprefix("torch.")

    def generate(
        self,
        adapter: str | None,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        seed: int,
        rows: Sequence[int],
        finished: Callable[[int, list[int]], None],
        description: str | None = None,
        stream: str = "",
        samples: Sequence[int] | None = None,
        ends: Collection[int] | None = None,
    ) -> None:
        """As `HFEngine.generate`; vLLM batches by itself and shows its own progress bar."""
        from vllm.lora.request import LoRARequest

        request = None
        if adapter is not None:
            request = LoRARequest(f"adapter{self.numbers[adapter]}", self.numbers[adapter], str(Path(adapter).resolve()))
        seeds = [row_seed(seed, stream, row, sample) for row, sample in zip(rows, samples or [0] * len(rows))]
        settings = sampling_settings(decoding, seeds, ends or [self.tokenizer.eos_token_id])
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        for start in range(0, len(inputs), SLICE):
            part = slice(start, start + SLICE)
            outputs = self.engine.generate(inputs[part], settings[part], lora_request=request, use_tqdm=description is not None)
            for place, output in enumerate(outputs, start=start):
                finished(place, list(output.outputs[0].token_ids))


class PolicyEngine:
    """Rollouts of a policy in training by vLLM beside it: the base model is loaded once more, and the policy's LoRA is handed over each time.

    It goes through a folder, in memory where the machine has one there. Every process has an engine of its own.

    Args:
        model: the base model, hub name or folder.
        dtype: of the policy's base.
        length: of prompt and response together, in tokens.
        rank: LoRA's.
        memory: share of the GPU's memory that the engine may take, or of the machine's for its CPU build.
        device: the policy's, "cuda:1" for example.
    """

    def __init__(self, model: str, dtype: str, length: int, rank: int, memory: float, device: str, seed: int) -> None:
        # vLLM runs in a process of its own, which shall see the policy's GPU alone and nothing of the launcher; a fork would have threads that stand still.
        hidden = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
        hidden += [name for name in os.environ if name.startswith("TORCHELASTIC_")]  # by one of them it would wait for a launcher's store
        gpu = device.partition(":")[2]
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        own = {"CUDA_VISIBLE_DEVICES": seen.split(",")[int(gpu)] if seen else gpu} if gpu else {}
        own["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        before = {name: os.environ.pop(name) for name in (*hidden, *own) if name in os.environ}
        os.environ |= own
        try:
            self.engine = load_vllm(model, dtype, length, rank, seed=seed, max_loras=1, gpu_memory_utilization=memory)
        finally:
            for name in own:
                del os.environ[name]
            os.environ |= before
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.handed_over = 0

    def generate(
        self, policy: PeftModel, prompts: Sequence[Sequence[int]], decoding: Decoding, seeds: Sequence[int], ends: Collection[int]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """One response to each prompt with the policy's weights as they are now.

        Args:
            policy: the model with its LoRA.
            prompts: token ids.
            seeds: one a prompt.
            ends: the tokens at which a response is over.

        Returns:
            Token ids of each response, up to and with the first of `ends`; and vLLM's log-probability of each.
        """
        from vllm.lora.request import LoRARequest

        self.handed_over += 1
        policy.save_pretrained(self.folder.name)
        request = LoRARequest(f"policy{self.handed_over}", self.handed_over, self.folder.name)  # vLLM reads a number once
        settings = sampling_settings(decoding, seeds, ends, logprobs=0)
        outputs = self.engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], settings, lora_request=request, use_tqdm=False
        )
        responses = [list(output.outputs[0].token_ids) for output in outputs]
        logprobs = [
            [step[token].logprob for token, step in zip(ids, output.outputs[0].logprobs)] for ids, output in zip(responses, outputs)
        ]
        return responses, logprobs
