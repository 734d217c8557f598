"""TRL 0.9.6's `PPOTrainer` with the same numbers and less work.

    trainer = FastPPOTrainer(config, policy, ref_model=None, tokenizer=tokenizer)     # as `trl.PPOTrainer`
    responses = trainer.generate(queries, batch_size=16, return_prompt=False, **decoding)
    statistics = trainer.step(queries, responses, scores)

The algorithm is TRL's to the last digit that rounding allows (tests compare the two live). What differs:

1. Logits exist only where a response token is predicted, and only for a few tokens at a time: log-probability, entropy and their
   gradient are reduced chunk by chunk, so that no [batch, time, vocabulary] tensor is ever there.
2. Every pass is over right-padded sequences as long as its own longest one, without an attention mask (causal attention never looks at
   what follows); passes without gradients take sequences of similar length together.
3. Array statistics ("objective/logprobs", "ppo/policy/ratio" ...) hold response tokens only, [batch, longest response], each
   response at the end of its row.
4. The policy stays in eval mode throughout: rollouts, old and new log-probabilities come from one distribution.
5. A loss or KL that is not finite raises before the optimiser moves. Where TRL zeroes a mini batch whose mean ratio is above
   `ratio_threshold`, so does this, and "ppo/skipped_minibatches" counts it.
6. Statistics of all ranks are averaged wherever they live (TRL loses the sum of those that are not on the accelerator's device), a
   live data loader's end does not cut gradient accumulation short, and `max_grad_norm` clips on every step, not on the first only.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from trl import PPOTrainer
from trl.core import convert_to_scalar, flatten_dict, masked_mean, masked_var, stack_dicts, stats_to_np

from parts.batching import batches_by_length
from parts.cpu_speed import linear, short_sequences
from parts.errors import InputError
from parts.generation import Decoding, ready_to_sample, sample

TOKENS_PER_PASS = 2048  # of passes without gradients, which keep no activations
LOGITS_PER_CHUNK = 2**23  # fp32 numbers in memory at a time: 32 MiB


# --------------------------------------------------------------------------------------- log-probabilities without logits


class _TokenLogProbs(torch.autograd.Function):
    """[tokens, hidden] states and their labels to log-probabilities and entropies, [tokens] each.

    The gradient of a token's log-probability by its hidden state is worked out in the forward pass, chunk by chunk, while the
    chunk's probabilities are at hand: (W[label] - probabilities @ W), through the soft cap where the model has one.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, labels: torch.Tensor, head: nn.Linear, soft_cap: float | None):
        wants_gradient = ctx.needs_input_grad[0]
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        size = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = head(hidden[part]).float()
            if soft_cap:
                logits = torch.tanh(logits / soft_cap) * soft_cap
            slope = 1 - (logits / soft_cap) ** 2 if soft_cap and wants_gradient else None
            chosen = logits.gather(1, labels[part, None])
            normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
            logprobs[part] = (chosen - normaliser).squeeze(1)
            logits -= normaliser
            probabilities = logits.exp()
            # Summed product by product: normaliser minus mean logit would lose three digits to cancellation.
            entropies[part] = -(probabilities * logits).sum(dim=1)
            if wants_gradient:
                by_logit = probabilities.neg_().scatter_add_(1, labels[part, None], torch.ones_like(chosen))
                if slope is not None:
                    by_logit *= slope
                gradient[part] = linear(by_logit.to(head.weight.dtype), head.weight.t())
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, by_logprob: torch.Tensor, by_entropy: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * by_logprob[:, None].to(gradient.dtype), None, None, None)


def _predict_or_forward(policy: nn.Module, *args, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None, **inputs):
    """The policy's forward pass: TRL's own, or, with `rows` and `columns`, only what PPO needs at these places.

    Args:
        rows, columns: [tokens] places in `input_ids` of the tokens that predict the response's tokens, which follow them.
        inputs: `input_ids` [batch, time], padded on the right.

    Returns:
        Log-probabilities, entropies and values, [tokens] each.
    """
    if rows is None:
        return type(policy).forward(policy, *args, **inputs)
    input_ids = inputs["input_ids"]
    base = base_model(policy)
    hidden = base.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[rows, columns]
    soft_cap = getattr(base.config, "final_logit_softcapping", None)
    logprobs, entropies = _TokenLogProbs.apply(hidden, input_ids[rows, columns + 1], base.get_output_embeddings(), soft_cap)
    return logprobs, entropies, policy.v_head(hidden).squeeze(-1).float()


def base_model(policy: nn.Module) -> nn.Module:
    """The causal LM inside TRL's wrapper with a value head, LoRA layers and all."""
    model = policy.pretrained_model
    return model.get_base_model() if policy.is_peft_model else model


def _teach_to_predict(policy: nn.Module) -> None:
    """Give a policy the forward pass above. It is set on the object, so that DDP and DeepSpeed call it through their own.

    Raises:
        InputError: there is no linear output head, or it is trained, which this trainer's gradients leave out.
    """
    head = base_model(policy).get_output_embeddings()
    if any(weight.requires_grad for weight in head.parameters()):
        raise InputError("the policy's output head is among the trained modules, expected LoRA on other modules")
    if not isinstance(head, nn.Linear):
        raise InputError("the policy has no linear output head, expected a causal language model")
    policy.forward = functools.partial(_predict_or_forward, policy)


def checkpoint_in_eval_mode(policy: nn.Module) -> None:
    """Let gradient checkpointing act in eval mode: layers checkpoint when their own `training` flag is set, which follows the grad
    mode here, while everything inside them stays as it is."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    backbone = base_model(policy).base_model
    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]

    def follow_grad_mode(module, args):
        for layer in layers:
            layer.training = torch.is_grad_enabled()

    backbone.register_forward_pre_hook(follow_grad_mode)


# -------------------------------------------------------------------------------------------------------------- a batch


@dataclass(frozen=True)
class _Sequences:
    """Queries with their responses, as passes over some of the rows want them."""

    tokens: list[torch.Tensor]
    query_lengths: list[int]
    response_lengths: list[int]

    def inputs(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """What `_predict_or_forward` takes for these rows."""
        device = self.tokens[0].device
        starts = [self.query_lengths[row] - 1 for row in rows]
        lengths = [self.response_lengths[row] for row in rows]
        return {
            "input_ids": pad_sequence([self.tokens[row] for row in rows], batch_first=True),
            "rows": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device),
            "columns": torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths)]).to(device),
        }

    def padded(self, rows: Sequence[int], values: torch.Tensor) -> torch.Tensor:
        """[tokens] values of the response tokens of these rows as [rows, longest response of the batch], 0 before each response.

        Responses end together, so that nothing follows one: advantages are summed from the end, and TRL whitens padding too.
        """
        width = max(self.response_lengths)
        lengths = torch.tensor([self.response_lengths[row] for row in rows])
        places = (torch.arange(width)[None] >= width - lengths[:, None]).nonzero(as_tuple=True)
        return values.new_zeros(len(rows), width).index_put(tuple(place.to(values.device) for place in places), values)


class FastPPOTrainer(PPOTrainer):
    """Drop-in for `trl.PPOTrainer` (0.9.6) with a causal LM as policy; see the head of this file for what differs.

    Raises:
        InputError: the policy is no causal LM with a linear output head, or trains that head.
        FloatingPointError: from `step`, where a KL or loss is not finite.
    """

    def __init__(self, config, model, *args, **kwargs):
        _teach_to_predict(model)
        checkpoint_in_eval_mode(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No dataset is provided")  # prompts come to `generate` and `step` from outside
            super().__init__(config, model, *args, **kwargs)
        self.model_params = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
        if self.ref_model is not None:
            _teach_to_predict(self.accelerator.unwrap_model(self.ref_model))

    # --------------------------------------------------------------------------------------------------------- rollouts

    def generate(
        self,
        query_tensor: torch.Tensor | list[torch.Tensor],
        length_sampler=None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs,
    ) -> list[torch.Tensor]:
        """Responses to a list of queries by `generation.sample`; everything that it does not know goes to TRL's own `generate`.

        Args:
            query_tensor: token ids, [time] each.
            batch_size: queries at a time.
            return_prompt: whether a response begins with its query.
            generation_kwargs: `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `top_k`; the draws come from torch's global generator.

        Returns:
            Token ids, [time] each, up to and with the first end-of-sequence token.
        """
        ours = set(generation_kwargs) <= {"max_new_tokens", "do_sample", "temperature", "top_p", "top_k"}
        if (
            not (ours and "max_new_tokens" in generation_kwargs and isinstance(query_tensor, list))
            or length_sampler
            or generate_ref_response
        ):
            return super().generate(query_tensor, length_sampler, batch_size, return_prompt, generate_ref_response, **generation_kwargs)
        options = dict(generation_kwargs)
        if not options.pop("do_sample", False):
            options["temperature"] = 0.0
        decoding = Decoding(**options)
        prompts = [query.tolist() for query in query_tensor]
        draws = torch.rand(len(prompts), decoding.max_new_tokens, dtype=torch.float64)
        policy = self.accelerator.unwrap_model(self.model)
        policy.eval()
        responses: list[list[int]] = []
        with ready_to_sample(policy.pretrained_model, batch_size):
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                responses += sample(policy.pretrained_model, prompts[part], decoding, draws[part], self.tokenizer.eos_token_id)
        return [
            torch.tensor(prompt + response if return_prompt else response, device=self.current_device)
            for prompt, response in zip(prompts, responses)
        ]

    # ------------------------------------------------------------------------------------------------------------- step

    def step(
        self,
        queries: list[torch.Tensor],
        responses: list[torch.Tensor],
        scores: list[torch.Tensor],
        response_masks: list[torch.Tensor] | None = None,
    ) -> dict[str, object]:
        """One PPO step on a batch of rollouts: `ppo_epochs` passes in mini batches, then the KL coefficient moves.

        Args:
            queries, responses: token ids, [time] each; a response has at least one.
            scores: one reward a response.
            response_masks: [response] each, 0 for response tokens that shall not count.

        Returns:
            TRL's statistics by TRL's names.
        """
        started = time.time()
        config = self.config
        queries, responses, scores, response_masks = self._step_safety_checker(
            config.batch_size, queries, responses, scores, response_masks
        )
        scores = self._scaled(torch.tensor(scores, device=self.current_device))
        sequences = _Sequences(
            [torch.cat(pair) for pair in zip(queries, responses)], [len(query) for query in queries], [len(text) for text in responses]
        )
        every_row = list(range(len(queries)))
        given = torch.cat(response_masks) if response_masks else torch.cat([torch.ones_like(response) for response in responses])
        masks = sequences.padded(every_row, given)
        self.model.eval()

        # 1. Log-probabilities and values as the rollouts were drawn, and the reference model's.
        timing, clock = {}, time.time()
        with torch.no_grad():
            logprobs, values = self._forward_all(self.model, sequences)
            with self.optional_peft_ctx():
                ref_logprobs, _ = self._forward_all(self.model if self.is_peft_model else self.ref_model, sequences)
            timing["time/ppo/forward_pass"], clock = time.time() - clock, time.time()

            # 2. Per-token rewards, advantages, returns: TRL's own, on response tokens only.
            rewards, non_score_reward, kls = self.compute_rewards(scores, logprobs, ref_logprobs, masks)
            _require_finite("the KL of the rollouts", (kls * masks).sum())
            timing["time/ppo/compute_rewards"], clock = time.time() - clock, time.time()
            values, advantages, returns = self.compute_advantages(values, rewards, masks)
            timing["time/ppo/compute_advantages"], clock = time.time() - clock, time.time()

        # 3. Epochs over shuffled mini batches.
        old = {"logprobs": logprobs, "values": values, "masks": masks, "advantages": advantages, "returns": returns}
        all_stats: list[dict] = []
        for _ in range(config.ppo_epochs):
            order = np.random.permutation(config.batch_size)
            for start in range(0, config.batch_size, config.mini_batch_size):
                rows = order[start : start + config.mini_batch_size]
                with self.accelerator.accumulate(self.model):
                    all_stats.append(self._train_rows(rows, sequences, {name: table[rows] for name, table in old.items()}))
            if config.early_stopping and self._early_stop(all_stats[-1]["policy/policykl"]):
                break
        timing["time/ppo/optimize_step"], clock = time.time() - clock, time.time()

        # 4. Statistics, then the KL coefficient for the next step.
        skipped = sum(stats.pop("skipped") for stats in all_stats)
        train_stats = stack_dicts(all_stats)
        for name in ("policy/advantages", "policy/ratio"):
            train_stats[name] = torch.flatten(train_stats[name]).unsqueeze(0)
        stats = self.record_step_stats(
            scores=scores,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            non_score_reward=non_score_reward,
            train_stats=train_stats,
            kl_coef=self.kl_ctl.value,
            masks=masks,
            queries=queries,
            responses=responses,
            kls=kls,
        )
        stats["ppo/skipped_minibatches"] = torch.tensor(float(skipped))
        if self.is_distributed:
            stats = self.gather_stats(stats)
        stats = convert_to_scalar(stats_to_np(stats))
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        timing["time/ppo/calc_stats"] = time.time() - clock
        self.kl_ctl.update(stats["objective/kl"], config.batch_size * self.accelerator.num_processes)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return {**stats, **timing, "time/ppo/total": time.time() - started}

    def _scaled(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores over their running deviation, shifted by their running mean, and clipped, as the configuration says."""
        config = self.config
        if config.use_score_scaling:
            self.running.update(scores)
            like = {"dtype": scores.dtype, "device": scores.device}
            spread = self.running.std.to(**like) + torch.finfo(scores.dtype).eps
            center = self.running.mean.to(**like) if config.use_score_norm else 0.0
            # Equal rewards have a deviation of some roundings of their mean, which is none: TRL divides rounding by it.
            rounding = 16 * torch.finfo(scores.dtype).eps * self.running.mean.abs().to(**like)
            scores = (
                torch.zeros_like(scores)
                if self.running.std.to(**like) <= rounding and config.use_score_norm
                else (scores - center) / spread
            )
        return scores if config.score_clip is None else torch.clip(scores, -config.score_clip, config.score_clip)

    def _forward_all(self, model: nn.Module, sequences: _Sequences) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and values of every response token, [batch, longest response], without gradients."""
        tables = None
        for rows in batches_by_length(list(map(len, sequences.tokens)), most_tokens=TOKENS_PER_PASS):
            with short_sequences(self.accelerator.unwrap_model(model)):
                logprobs, _, values = model(**sequences.inputs(rows))
            found = sequences.padded(rows, logprobs), sequences.padded(rows, values)
            tables = tables or tuple(table.new_zeros(len(sequences.tokens), table.shape[1]) for table in found)
            for table, part in zip(tables, found):
                table[rows] = part
        return tables

    def _train_rows(self, rows: np.ndarray, sequences: _Sequences, old: dict[str, torch.Tensor]) -> dict[str, object]:
        """Forward and backward pass over one mini batch; the optimiser moves where accumulation is complete."""
        with short_sequences(self.accelerator.unwrap_model(self.model)):  # the backward pass too: checkpointed layers run again there
            logprobs, entropies, values = (sequences.padded(rows, found) for found in self.model(**sequences.inputs(rows)))
            loss, stats = self._loss(old, logprobs, entropies, values)
            _require_finite("the loss", loss)
            self.accelerator.backward(loss)
        if self.config.max_grad_norm is not None and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model_params, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return stats

    def _loss(
        self, old: dict[str, torch.Tensor], logprobs: torch.Tensor, entropies: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, object]]:
        """PPO's clipped policy and value losses (Schulman et al. 2017) over the tokens of a mini batch, and TRL's statistics of them."""
        config, mask, advantages, returns = self.config, old["masks"], old["advantages"], old["returns"]
        clipped_values = values.clamp(old["values"] - config.cliprange_value, old["values"] + config.cliprange_value)
        value_errors, clipped_errors = (values - returns) ** 2, (clipped_values - returns) ** 2
        value_loss = 0.5 * masked_mean(torch.max(value_errors, clipped_errors), mask)

        ratio = torch.exp(logprobs - old["logprobs"])
        gains = -advantages * ratio
        clipped_gains = -advantages * ratio.clamp(1.0 - config.cliprange, 1.0 + config.cliprange)
        policy_loss = masked_mean(torch.max(gains, clipped_gains), mask)

        mean_ratio = masked_mean(ratio, mask).item()
        skipped = mean_ratio > config.ratio_threshold
        if skipped:
            warnings.warn(f"the mean ratio of a mini batch is {mean_ratio:.2f}, above {config.ratio_threshold}: skipped", stacklevel=2)
            policy_loss, value_loss = policy_loss * 0.0, value_loss * 0.0
        loss = policy_loss + config.vf_coef * value_loss

        with torch.no_grad():
            stats = {
                "loss": {"policy": policy_loss.detach(), "value": value_loss.detach(), "total": loss.detach()},
                "policy": {
                    "entropy": masked_mean(entropies, mask),
                    "approxkl": 0.5 * masked_mean((logprobs - old["logprobs"]) ** 2, mask),
                    "policykl": masked_mean(old["logprobs"] - logprobs, mask),
                    "clipfrac": masked_mean((clipped_gains > gains).float(), mask),
                    "advantages": advantages,
                    "advantages_mean": masked_mean(advantages, mask),
                    "ratio": ratio.detach(),
                },
                "returns": {"mean": masked_mean(returns, mask), "var": masked_var(returns, mask)},
                "val": {
                    "vpred": masked_mean(values, mask),
                    "error": masked_mean(value_errors, mask),
                    "clipfrac": masked_mean((clipped_errors > value_errors).float(), mask),
                    "mean": masked_mean(old["values"], mask),
                    "var": masked_var(old["values"], mask),
                },
            }
        return loss, {**flatten_dict(stats), "skipped": skipped}

    def gather_stats(self, stats: dict[str, object]) -> dict[str, object]:
        """Single numbers averaged over ranks; arrays stay those of this rank (their lengths differ)."""
        import torch.distributed as dist

        arrays = ("objective/kl_dist", "objective/logprobs", "objective/ref_logprobs", "ppo/policy/advantages", "ppo/policy/ratio")
        names = [name for name, value in stats.items() if isinstance(value, torch.Tensor) and name not in arrays]
        together = torch.stack([stats[name].detach().double().reshape(()).to(self.accelerator.device) for name in names])
        dist.all_reduce(together, dist.ReduceOp.SUM)
        return {**stats, **dict(zip(names, (together / self.accelerator.num_processes).float().cpu()))}


def _require_finite(what: str, value: torch.Tensor) -> None:
    """Raises FloatingPointError before the optimiser moves: the weights stay as they were."""
    if not math.isfinite(value.item()):
        raise FloatingPointError(f"{what} is {value.item()}")
