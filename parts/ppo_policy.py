"""The policy of PPO as the trainer calls it: log-probabilities, entropies and values at the places that PPO needs, and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from parts.errors import InputError
from parts.logprobs import WayToLogits, token_log_probs
from parts.packing import Rollouts


def predict_or_forward(
    policy: nn.Module,
    *args,
    way: WayToLogits | None = None,
    rows: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    **inputs,
):
    """The policy's forward pass: TRL's own, or, with `rows` and `columns`, only what PPO needs at these places.

    Args:
        way: from hidden states to logits, where it is known already.
        rows, columns: [tokens] places in `input_ids` of the tokens that predict the response's tokens, which follow them.
        inputs: `input_ids` [batch, time], padded on the right; or [1, time], packed, with their `position_ids`.

    Returns:
        Log-probabilities, entropies and values, [tokens] each.
    """
    if rows is None:
        return type(policy).forward(policy, *args, **inputs)
    input_ids = inputs["input_ids"]
    way = way or WayToLogits(base_model(policy))
    hidden = way.backbone(**inputs, use_cache=False).last_hidden_state[rows, columns]
    logprobs, entropies = token_log_probs(hidden, input_ids[rows, columns + 1], way)
    return logprobs, entropies, policy.v_head(hidden).squeeze(-1).float()


def base_model(policy: nn.Module) -> nn.Module:
    """The causal LM inside TRL's wrapper with a value head, LoRA layers and all."""
    model = policy.pretrained_model
    return model.get_base_model() if policy.is_peft_model else model


def teach_to_predict(policy: nn.Module) -> Callable:
    """Give a policy the forward pass above, and return it. It is set on the object: DDP, DeepSpeed and autocast call it through their own.

    Raises:
        InputError: there is no output head, or an adapter trains it.
    """
    way = WayToLogits(base_model(policy))
    if way.is_trained and policy.is_peft_model:
        raise InputError("the policy's output head is among the trained modules, expected LoRA on other modules")
    policy.forward = forward = functools.partial(predict_or_forward, policy, way=way)
    return forward


@torch.no_grad()
def check_log_probabilities(policy: nn.Module, forward: Callable, attention: Callable[[nn.Module], AbstractContextManager]) -> None:
    """Compare a policy's `forward`, the one above, with the model's own, one row at a time, on a few tokens.

    Args:
        attention: in which `forward` runs, `short_sequences` for example.

    Raises:
        InputError: their log-probabilities differ by more than rounding.
    """
    model = base_model(policy)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    draw = torch.Generator().manual_seed(0)
    most = min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])
    tokens = [torch.randint(most, (length,), generator=draw).to(device) for length in (9, 5)]
    sequences = Rollouts(tokens, [1] * len(tokens), [len(row) - 1 for row in tokens])
    with attention(model):
        found, _, _ = forward(**sequences.inputs(range(len(tokens))))
    own = torch.cat([model(input_ids=row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1) for row in tokens])
    difference = (found - own.gather(1, torch.cat([row[1:] for row in tokens])[:, None]).squeeze(1)).abs().mean().item()
    if not difference <= (1e-3 if dtype == torch.float32 else 0.1):
        raise InputError(
            f"{model.config.name_or_path or type(model).__name__}: PPO's log-probabilities are {difference:.2g} nats off the model's own, "
            f"expected a model whose way to them is known ({type(model).__name__} is not)"
        )


def checkpoint_in_eval_mode(policy: nn.Module) -> None:
    """Let gradient checkpointing, where it is switched on, act in eval mode.

    A layer checkpoints when its own `training` flag is set, which follows the grad mode here. While the layer runs, the flag is off again:
    some layers read it for their dropout.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    backbone = base_model(policy).base_model
    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing]

    def in_eval_mode(layer: nn.Module, run: Callable, *args: object) -> object:
        layer.training = False
        return run(*args)

    def follow_grad_mode(module, args):
        for layer in layers:
            layer.training = layer.gradient_checkpointing and torch.is_grad_enabled()

    for layer in layers:
        checkpointing = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = functools.partial(
            lambda layer, checkpointing, run, *args: checkpointing(functools.partial(in_eval_mode, layer, run), *args), layer, checkpointing
        )
    backbone.register_forward_pre_hook(follow_grad_mode)
