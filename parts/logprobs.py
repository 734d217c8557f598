"""A causal LM's log-probabilities from hidden states, without a whole batch's logits, in the model's own way.

    way = WayToLogits(model)
    logprobs, entropies = token_log_probs(hidden, labels, way)

What stands between the last hidden state and the logits is the model's own matter: most multiply by the output head, others also scale,
soft-cap, project or normalise. Where it is the head alone, its gradient is worked out by hand; anything else runs as the model has it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from parts.cpu_speed import linear
from parts.errors import InputError

LOGITS_PER_CHUNK = 2**23  # that the head computes at a time: 32 MiB in fp32
LOGITS_IN_CACHE = 2**20  # of them that a CPU takes further at a time, in fp32: what is read again and again stays in its caches


class _BackboneOutput(BaseModelOutputWithPast):
    """Hidden states alone: what some backbones return beside them is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class WayToLogits:
    """Hidden states [tokens, hidden] to logits [tokens, vocabulary], as `model` computes them.

    The model's own forward pass runs with a stand-in for the backbone's, which returns the hidden states given.

    Args:
        model: a causal LM, LoRA layers and all; on the meta device, where nothing can be tried, a linear head is taken for all there is.

    Attributes:
        is_product: whether the way is the output head and nothing else.
        is_trained: whether weights on the way are trained, the output head's or others.

    Raises:
        InputError: it has no output head, or one whose way cannot be taken alone.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.head = model.get_output_embeddings()
        inner = model.get_decoder()  # where the backbone wraps it, some call it alone
        self.backbone = inner if model.base_model is model else model.base_model
        if not isinstance(getattr(self.head, "weight", None), torch.Tensor) or self.backbone in (model, None):
            raise InputError("the policy has no output head, expected a causal language model")
        self.backbones = [self.backbone, *({inner} - {self.backbone, model, None})]
        inside = {id(weight) for weight in self.backbone.parameters()} - {id(weight) for weight in self.head.parameters()}
        self.is_trained = any(weight.requires_grad and id(weight) not in inside for weight in model.parameters())
        self.is_product = isinstance(self.head, nn.Linear) and (self.head.weight.is_meta or self._is_product())

    @torch.no_grad()
    def _is_product(self) -> bool:
        """Whether the way is the head and nothing else, tried on logits far larger than a model's, which caps and scales would move."""
        weight = self.head.weight
        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(4, weight.shape[1], generator=draw).to(weight.device, weight.dtype)
        expected = self.head(hidden)
        hidden = hidden * (100 / expected.float().std().clamp(min=1e-6)).to(hidden.dtype)
        expected = self.head(hidden).float()
        try:
            found = self(hidden).float()
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):  # the backbone's output is not what the head takes
            return False
        close = 1e-5 if weight.dtype == torch.float32 else 2e-2
        return found.shape == expected.shape and bool(torch.allclose(found, expected, rtol=0, atol=close * float(expected.abs().max())))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        def given(*args: object, **kwargs: object) -> _BackboneOutput:
            return _BackboneOutput(last_hidden_state=hidden[None])

        forwards = [module.__dict__.get("forward") for module in self.backbones]
        try:
            for module in self.backbones:
                module.forward = given
            return self.model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device), use_cache=False).logits[0]
        finally:
            for module, forward in zip(self.backbones, forwards):
                del module.forward
                if forward is not None:
                    module.forward = forward


def token_log_probs(hidden: torch.Tensor, labels: torch.Tensor, way: WayToLogits) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, hidden] states and their labels to log-probabilities and entropies, [tokens] each, fp32; these without a gradient.

    Where weights on the way are trained too, the backward pass computes each chunk's logits again, as gradient checkpointing does.
    """
    if not (way.is_trained and torch.is_grad_enabled()):
        return TokenLogProbs.apply(hidden, labels, way)
    size = max(1, LOGITS_PER_CHUNK // way.head.weight.shape[0])
    parts = [slice(start, start + size) for start in range(0, len(hidden), size)]
    found = [checkpoint(_of_chunk, hidden[part], labels[part], way, use_reentrant=False) for part in parts]
    logprobs, entropies = (torch.cat(columns) for columns in zip(*found))
    return logprobs, entropies


def _of_chunk(hidden: torch.Tensor, labels: torch.Tensor, way: WayToLogits) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = (way.head(hidden) if way.is_product else way(hidden)).float().log_softmax(dim=-1)
    known = logprobs.detach()
    return logprobs.gather(1, labels[:, None]).squeeze(1), -(known.exp() * known).sum(dim=1)


class TokenLogProbs(torch.autograd.Function):
    """[tokens, hidden] states and their labels to log-probabilities and entropies, [tokens] each.

    The gradient of a token's log-probability by its hidden state is worked out in the forward pass, chunk by chunk, while the
    chunk's probabilities are at hand: by the logits it is (1 at the label) - probabilities, and from there it goes back on the model's way.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, labels: torch.Tensor, way: WayToLogits):
        wants_gradient = ctx.needs_input_grad[0]
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        weight = way.head.weight
        size = max(1, LOGITS_PER_CHUNK // weight.shape[0])
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            if way.is_product:
                own = way.head(hidden[part])
            else:
                with torch.set_grad_enabled(wants_gradient):
                    states = hidden[part].detach().requires_grad_(wants_gradient)
                    own = way(states)
            # Gradients take the logits' place, unless the graph needs these.
            by_logit = own if way.is_product or not wants_gradient else torch.empty_like(own)
            few = max(1, LOGITS_IN_CACHE // weight.shape[0]) if own.device.type == "cpu" else size
            tables = own.detach(), labels[part, None], logprobs[part, None], entropies[part, None], by_logit
            for piece, label, logprob, entropy, by_piece in zip(*(table.split(few) for table in tables)):
                logits = piece.to(torch.float32, copy=not way.is_product)
                logits -= logits.amax(dim=1, keepdim=True)
                chosen = logits.gather(1, label)
                weights = logits.exp()
                total = weights.sum(dim=1, keepdim=True)
                logprob.copy_(chosen - total.log())
                # Both terms are positive. The normaliser minus the mean logit, unshifted, would lose three digits to cancellation.
                entropy.copy_(total.log() - logits.mul_(weights).sum(dim=1, keepdim=True) / total)
                if wants_gradient:
                    by_piece.copy_(weights.div_(total.neg_()).scatter_add_(1, label, torch.ones_like(chosen)))
            if wants_gradient:
                if way.is_product:
                    gradient[part] = linear(by_logit, weight.t())
                else:
                    (gradient[part],) = torch.autograd.grad(own, states, by_logit)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, by_logprob: torch.Tensor, by_entropy: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * by_logprob[:, None].to(gradient.dtype), None, None)
