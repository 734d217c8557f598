"""A PPO run counted instead of run: the memory of the trainer's passes, their kernels, floating-point operations.

    policy = meta_policy(config, settings, "bfloat16")          # shapes without numbers
    peak, kernels = trainer_pass(policy, 2, 512, 512, trained=True)
    before, epochs = policy_operations(policy, config).step(16, 50, 256, epochs=4)

The trainer's own forward and backward pass runs over meta tensors, and the bytes of all tensors that are alive are followed to their peak.
Operations are worked out from the shapes of the linear layers, so PyTorch's own counter can check them (`benchmarks/check_scale.py`).
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PretrainedConfig
from trl import AutoModelForCausalLMWithValueHead

from parts.errors import InputError
from parts.models import loading
from parts.ppo_policy import base_model, checkpoint_in_eval_mode, predict_or_forward
from parts.ppo_trainer import TOKENS_PER_PASS

META_ATTENTION = "flash_on_meta"  # the name of `_flash_on_meta` among transformers' kinds of attention


def meta_policy(config: PretrainedConfig, settings, dtype: str) -> AutoModelForCausalLMWithValueHead:
    """The policy that `ppo_setup.load_policy` makes, without numbers. LoRA and value head are fp32 on a base of `dtype`.

    Args:
        settings: with `lora_r` and `lora_target_modules`, as `PPOSettings` has them.

    Raises:
        InputError: the model has no such modules.
    """
    AttentionInterface.register(META_ATTENTION, _flash_on_meta)
    lora = LoraConfig(task_type="CAUSAL_LM", r=settings.lora_r, lora_dropout=0.0, target_modules=settings.lora_target_modules)
    with torch.device("meta"), loading(config.model_type, f"a policy with LoRA on {', '.join(settings.lora_target_modules)}"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).requires_grad_(False)
        policy = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=lora).eval()
    model.config._attn_implementation = META_ATTENTION
    return policy


def _flash_on_meta(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' SDPA as a GPU computes it. On the meta device PyTorch would choose plain products, with a [time, time] table a head."""
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, query.shape[2] > 1, scale=scaling)[0]
    return found.transpose(1, 2).contiguous(), None


class Follower(TorchDispatchMode):
    """Counts kernels, and follows the bytes of the tensors that are alive besides a model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {weight.untyped_storage()._cdata for weight in (*model.parameters(), *model.buffers())}
        self.kernels = self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        storages = [tensor.untyped_storage() for tensor in tree_leaves(found) if isinstance(tensor, torch.Tensor)]
        new = {storage._cdata: storage for storage in storages if storage._cdata not in self.known}
        self.kernels += bool(new) or func._schema.is_mutable  # what gives another view of known memory launches nothing
        for key, storage in new.items():
            self.known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return found

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


# --------------------------------------------------------------------------------------------------- memory and kernels


def trainer_pass(policy: nn.Module, rows: int, prompt: int, response: int, trained: bool, checkpointing: bool = False) -> tuple[int, int]:
    """A pass of the trainer over `rows` sequences of a prompt and a response, in tokens.

    Args:
        trained: with the backward pass; without it there are no gradients.
        checkpointing: recompute activations in the backward pass.

    Returns:
        Bytes that it adds at its peak, the gradients of the trained weights included, and the kernels that it launches.
    """
    if checkpointing:
        policy.pretrained_model.gradient_checkpointing_enable()
        checkpoint_in_eval_mode(policy)
    with torch.device("meta"), torch.set_grad_enabled(trained), Follower(policy) as alive:
        places = torch.zeros(rows * response, dtype=torch.long)
        inputs = {"input_ids": torch.zeros(rows, prompt + response, dtype=torch.long), "rows": places, "columns": places}
        logprobs, _, values = predict_or_forward(policy, **inputs)
        if trained:
            (logprobs.sum() + values.sum()).backward()
    policy.zero_grad()
    if checkpointing:
        policy.pretrained_model.gradient_checkpointing_disable()
    return alive.peak, alive.kernels


def sampling_kernels(policy: nn.Module, rows: int) -> int:
    """Kernels of a pass over one new token of each row."""
    model = policy.pretrained_model
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), Follower(policy) as alive:
        model(input_ids=torch.zeros(rows, 1, dtype=torch.long, device="meta"), past_key_values=cache, logits_to_keep=1)
    return alive.kernels


def cache_bytes(config: PretrainedConfig) -> int:
    """A token's keys and values in all layers, in bf16."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size(config) * 2


def rows_per_pass(rows: int, prompt: int, response: int) -> int:
    """How many of `rows` sequences the trainer's passes without gradients take together."""
    return max(1, min(rows, TOKENS_PER_PASS // (prompt + response)))


def head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def count(model: nn.Module, trained: bool) -> int:
    """Numbers in the weights that are trained, or in those that are not."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad == trained)


# -------------------------------------------------------------------------------------------- floating-point operations


@dataclass(frozen=True)
class Operations:
    """Weights of linear layers, by what is done with them. A product of a token with n weights is 2 n operations.

    Attention is counted as PyTorch's own counter does it, without the half that a causal kernel saves.
    """

    frozen: int
    lora: int
    head: int
    value: int
    attention: int  # layers * heads * head size

    @classmethod
    def of(cls, model: nn.Module, config: PretrainedConfig, head: nn.Module | None = None) -> Operations:
        """Those of a policy with its output head, or of a trunk.

        Raises:
            InputError: there are tables of weights that are neither linear layers nor embeddings, which this does not count.
        """
        counts = dict.fromkeys(("frozen", "lora", "head", "value"), 0)
        counted = set()
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                counted.add(id(module.weight))
            if isinstance(module, nn.Linear):
                kind = "head" if module is head else "lora" if "lora_" in name else "value" if "v_head" in name else "frozen"
                counts[kind] += module.weight.numel()
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and id(weight) not in counted:
                raise InputError(f"{config.model_type}: {name} is no linear layer's and no embedding, expected a plain transformer")
        return cls(**counts, attention=config.num_hidden_layers * config.num_attention_heads * head_size(config))

    def forward(self, tokens: float, context: float, adapter: bool = True) -> float:
        """Of the layers alone, over `tokens` that see `context` tokens each."""
        return tokens * (2 * (self.frozen + adapter * self.lora) + 4 * self.attention * context)

    def backward(self, tokens: float, context: float) -> float:
        """Gradients of the inputs everywhere, of the weights in LoRA; a flash kernel multiplies five times where it did twice."""
        return tokens * (2 * self.frozen + 4 * self.lora + 10 * self.attention * context)

    def step(
        self, rows: int, prompt: float, response: float, epochs: int, checkpointing: bool = False, begun: int = 0
    ) -> tuple[float, float]:
        """A PPO step: the policy's and the reference's log-probabilities; the epochs.

        With checkpointing a whole forward pass is added. PyTorch leaves out a layer's last product, whose result no gradient needs.

        Args:
            begun: rows whose first pass with gradients is the one before it too: the trainer's first mini batch in a single process.
        """
        tokens, context, predicted = rows * (prompt + response), prompt + response, rows * response
        layers, passes = self.forward(tokens, context), 1 - begun / rows
        before = (
            layers * passes + self.forward(tokens, context, adapter=False) + predicted * (1 + passes) * (2 * self.head + 2 * self.value)
        )
        loss = layers * (1 + checkpointing) + predicted * (4 * self.head + 2 * self.value)  # the head's gradient is worked out beside it
        return before, epochs * (loss + self.backward(tokens, context) + predicted * 4 * self.value)


def policy_operations(policy: nn.Module, config: PretrainedConfig) -> Operations:
    """Those of a policy with LoRA and a value head, `meta_policy`'s or a real one."""
    return Operations.of(policy, config, base_model(policy).get_output_embeddings())


class _NoModules(nullcontext):
    """For `FlopCounterMode`: everything belongs to the whole."""

    parents = frozenset({"Global"})


def torchs_counter() -> FlopCounterMode:
    """PyTorch's own counter of operations, as a context: totals only, and the CPU's attention too.

    Its tracker of modules stumbles over the head that `predict_or_forward` calls inside an autograd function.
    """
    counter, kernels = FlopCounterMode(display=False), torch.ops.aten
    counter.mod_tracker = _NoModules()
    for end in ("", "_backward"):
        formula = counter.flop_registry[getattr(kernels, f"_scaled_dot_product_flash_attention{end}")]
        counter.flop_registry[getattr(kernels, f"_scaled_dot_product_flash_attention_for_cpu{end}")] = formula
    return counter
