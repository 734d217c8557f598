"""TRL 0.9.6's `PPOTrainer` with the same numbers and less work.

    trainer = FastPPOTrainer(config, policy, ref_model=None, tokenizer=tokenizer)     # as `trl.PPOTrainer`
    responses = trainer.generate(queries, batch_size=16, return_prompt=False, **decoding)
    statistics = trainer.step(queries, responses, scores)

The algorithm is TRL's to the last digit that rounding allows (tests compare the two live). What differs:

1. Logits exist only where a response token is predicted, and only for a few tokens at a time: log-probability, entropy and their
   gradient are reduced chunk by chunk, so that no [batch, time, vocabulary] tensor is ever there.
2. Every pass is over right-padded sequences as long as its own longest one, without an attention mask (causal attention never looks at
   what follows); passes without gradients take sequences of similar length together. On a CPU, sequences are packed without padding,
   and what they begin with is computed once (`parts/packing.py`). The first mini batch's pass is also its pass for old log-probabilities.
3. Array statistics ("objective/logprobs", "ppo/policy/ratio" ...) hold response tokens only, [batch, longest response], each
   response at the end of its row.
4. The policy stays in eval mode throughout: rollouts, old and new log-probabilities come from one distribution.
5. A loss or KL that is not finite raises before the optimiser moves. Where TRL zeroes a mini batch whose mean ratio is above
   `ratio_threshold`, so does this, and "ppo/skipped_minibatches" counts it.
6. Statistics of all ranks are averaged wherever they live (TRL loses the sum of those that are not on the accelerator's device), a
   live data loader's end does not cut gradient accumulation short, and `max_grad_norm` clips on every step, not on the first only.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn
from trl import PPOTrainer
from trl.core import convert_to_scalar, flatten_dict, masked_mean, masked_var, stack_dicts, stats_to_np
from trl.trainer import RunningMoments

from parts.batching import batches_by_length
from parts.cpu_speed import fewer_kernels, short_sequences
from parts.errors import InputError
from parts.packing import Rollouts, attention_within, can_pack, longest
from parts.ppo_policy import check_log_probabilities, checkpoint_in_eval_mode, teach_to_predict
from parts.rows import QTYPES
from parts.sampling import Decoding, check_sampling, end_tokens, ready_to_sample, sample

TOKENS_PER_PASS = 2048  # of passes without gradients, which keep no activations


class FastPPOTrainer(PPOTrainer):
    """Drop-in for `trl.PPOTrainer` (0.9.6) with a causal LM as policy; see the head of this file for what differs.

    Raises:
        InputError: the policy is no causal LM with an output head, trains that head, or its log-probabilities or samples are not the
            model's own.
        FloatingPointError: from `step`, where a KL or loss is not finite.
    """

    def __init__(self, config, model, *args, **kwargs):
        forward = teach_to_predict(fewer_kernels(model))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No dataset is provided")  # prompts come to `generate` and `step` from outside
            super().__init__(config, model, *args, **kwargs)
        self.model_params = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.running_by_qtype = {qtype: RunningMoments(self.accelerator) for qtype in QTYPES}
        self.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
        policy = self.accelerator.unwrap_model(self.model)
        checkpoint_in_eval_mode(policy)
        self.attention = short_sequences
        try:
            check_log_probabilities(policy.eval(), forward, self.attention)
        except InputError:  # its scores may be too large for bf16
            self.attention = nullcontext
            check_log_probabilities(policy, forward, self.attention)
        for together in (True, False):  # development rollouts, and a step's
            check_sampling(policy.pretrained_model, together)
        self.ends = end_tokens(self.tokenizer, policy.pretrained_model.generation_config)
        forwards = [forward]
        if self.ref_model is not None:
            forwards.append(teach_to_predict(self.accelerator.unwrap_model(self.ref_model)))
        backbones = [own.keywords["way"].backbone for own in forwards]
        plain = self.accelerator.mixed_precision == "no"  # autocast would change the dtypes inside packed attention
        self.most_packed = min(longest(backbone) if plain and can_pack(backbone) else 0 for backbone in backbones)

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
        """Responses to a list of queries by `sampling.sample`; everything that it does not know goes to TRL's own `generate`.

        Args:
            query_tensor: token ids, [time] each.
            batch_size: queries at a time.
            return_prompt: whether a response begins with its query.
            generation_kwargs: `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `top_k`; the draws come from torch's global generator.

        Returns:
            Token ids, [time] each, up to and with the first of `ends`, the attribute: by default the tokenizer's and the model's.
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
        with ready_to_sample(policy.pretrained_model, batch_size):
            # Prompts are read as they were for the kept runs, which come out again: another rounding would make other runs of them.
            responses = sample(policy.pretrained_model, prompts, decoding, draws, self.ends, batch_size, together=False)
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
        qtypes: Sequence[str] | None = None,
    ) -> dict[str, object]:
        """One PPO step on a batch of rollouts: `ppo_epochs` passes in mini batches, then the KL coefficient moves.

        Args:
            queries, responses: token ids, [time] each; a response has at least one.
            scores: one reward a response.
            response_masks: [response] each, 0 for response tokens that shall not count.
            qtypes: a query type a response; each type's scores are normalised by the running moments of that type alone.

        Returns:
            TRL's statistics by TRL's names.
        """
        started = time.time()
        config = self.config
        queries, responses, scores, response_masks = self._step_safety_checker(
            config.batch_size, queries, responses, scores, response_masks
        )
        scores = self._scaled(torch.tensor(scores, device=self.current_device), qtypes)
        sequences = Rollouts(
            [torch.cat(pair) for pair in zip(queries, responses)], [len(query) for query in queries], [len(text) for text in responses]
        )
        every_row = list(range(len(queries)))
        given = torch.cat(response_masks) if response_masks else torch.cat([torch.ones_like(response) for response in responses])
        masks = sequences.padded(every_row, given)
        self.model.eval()

        # 1. Log-probabilities and values as the rollouts were drawn, and the reference model's. The first mini batch meets the same weights:
        # its pass is both (processes that wait for each other in a backward pass would have to know of it).
        timing, clock = {}, time.time()
        order = np.random.permutation(config.batch_size)
        first = order[: config.mini_batch_size if self.accelerator.num_processes == 1 else 0].tolist()
        with torch.no_grad():
            logprobs, values = self._forward_all(self.model, sequences, sorted(set(every_row) - set(first)))
            with self.optional_peft_ctx():
                ref_logprobs, _ = self._forward_all(self.model if self.is_peft_model else self.ref_model, sequences, every_row)
        begun = self._forward_rows(first, sequences) if first else None
        with torch.no_grad():
            if begun:
                logprobs[first], _, values[first] = begun
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
        for epoch in range(config.ppo_epochs):
            order = np.random.permutation(config.batch_size) if epoch else order
            for start in range(0, config.batch_size, config.mini_batch_size):
                rows = order[start : start + config.mini_batch_size]
                with self.accelerator.accumulate(self.model):
                    all_stats.append(self._train_rows(rows, sequences, {name: table[rows] for name, table in old.items()}, begun))
                    begun = None
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
        stats["ppo/skipped_minibatches"] = torch.tensor(float(skipped * self.accelerator.num_processes))  # of all, once averaged over them
        if self.is_distributed:
            stats = self.gather_stats(stats)
        stats = convert_to_scalar(stats_to_np(stats))
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if len(self.optimizer.param_groups) > 1:
            stats["ppo/value_learning_rate"] = self.optimizer.param_groups[1]["lr"]
        for qtype, running in self.running_by_qtype.items() if qtypes else ():
            stats |= {f"ppo/running_mean/{qtype}": float(running.mean), f"ppo/running_std/{qtype}": float(running.std)}
        timing["time/ppo/calc_stats"] = time.time() - clock
        self.kl_ctl.update(stats["objective/kl"], config.batch_size * self.accelerator.num_processes)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return {**stats, **timing, "time/ppo/total": time.time() - started}

    @torch.no_grad()
    def kl(self, queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[float]:
        """KL of policy and reference in nats a response, as each response estimates it: the sum of TRL's own per-token estimates.

        Args:
            queries, responses: token ids. Processes may have other numbers of them.
        """
        policy, rows = self.accelerator.unwrap_model(self.model).eval(), list(range(len(queries)))
        reference = policy if self.is_peft_model else self.accelerator.unwrap_model(self.ref_model)
        tokens = [torch.tensor([*query, *response], device=self.current_device) for query, response in zip(queries, responses)]
        sequences = Rollouts(tokens, list(map(len, queries)), list(map(len, responses)))
        ones = torch.ones(sum(map(len, responses)), device=self.current_device)
        logprobs, _ = self._forward_all(policy, sequences, rows)
        with self.optional_peft_ctx():
            reference_logprobs, _ = self._forward_all(reference, sequences, rows)
        return (self._kl_penalty(logprobs, reference_logprobs) * sequences.padded(rows, ones)).sum(dim=1).tolist()

    def _scaled(self, scores: torch.Tensor, qtypes: Sequence[str] | None) -> torch.Tensor:
        """Scores over their running deviation, shifted by their running mean, and clipped, as the configuration says."""
        config = self.config
        scores = scores.clone()
        for running, rows in self._moments_in_use(qtypes) if config.use_score_scaling else ():
            running.update(scores[rows])
            like = {"dtype": scores.dtype, "device": scores.device}
            spread = running.std.to(**like) + torch.finfo(scores.dtype).eps if running.count > 1 else 1.0  # one score has no deviation
            center = running.mean.to(**like) if config.use_score_norm else 0.0
            # Equal rewards have a deviation of some roundings of their mean, which is none: TRL divides rounding by it.
            rounding = 16 * torch.finfo(scores.dtype).eps * running.mean.abs().to(**like)
            equal = running.count > 1 and running.std.to(**like) <= rounding and config.use_score_norm
            scores[rows] = 0.0 if equal else (scores[rows] - center) / spread
        return scores if config.score_clip is None else torch.clip(scores, -config.score_clip, config.score_clip)

    def _moments_in_use(self, qtypes: Sequence[str] | None) -> list[tuple[RunningMoments, object]]:
        """The running moments of a batch, with the rows that are theirs. Every rank gets the same ones, some perhaps without rows."""
        if qtypes is None:
            return [(self.running, slice(None))]
        if unknown := set(qtypes) - set(self.running_by_qtype):
            raise ValueError(f"unknown query types {unknown}, expected {' or '.join(self.running_by_qtype)}")
        rows = torch.tensor([[own == qtype for own in qtypes] for qtype in self.running_by_qtype], device=self.current_device)
        counts = self.accelerator.reduce(rows.sum(dim=1)).tolist()
        return [found for *found, count in zip(self.running_by_qtype.values(), rows, counts) if count]

    @contextmanager
    def _arranged(self, model: nn.Module, sequences: Rollouts, rows: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
        """What a pass over some rows takes while the block runs: packed where the models can, padded otherwise."""
        policy = self.accelerator.unwrap_model(model)
        if max(len(sequences.tokens[row]) for row in rows) <= self.most_packed:
            packed, inputs = sequences.packed(rows)
            with attention_within(policy, packed):
                yield inputs
        else:
            with self.attention(policy):
                yield sequences.inputs(rows)

    def _forward_all(self, model: nn.Module, sequences: Rollouts, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and values of the response tokens of some rows, [batch, longest response], without gradients."""
        shape = len(sequences.tokens), max(sequences.response_lengths)
        tables = tuple(torch.zeros(shape, device=self.current_device) for _ in range(2))
        for places in batches_by_length([len(sequences.tokens[row]) for row in rows], most_tokens=TOKENS_PER_PASS):
            part = [rows[place] for place in places]
            with self._arranged(model, sequences, part) as inputs:
                logprobs, _, values = model(**inputs)
            for table, found in zip(tables, (logprobs, values)):
                table[part] = sequences.padded(part, found)
        return tables

    def _forward_rows(self, rows: Sequence[int], sequences: Rollouts) -> list[torch.Tensor]:
        """Log-probabilities, entropies and values of a mini batch, [rows, longest response] each, with gradients."""
        with self._arranged(self.model, sequences, rows) as inputs:
            return [sequences.padded(rows, found) for found in self.model(**inputs)]

    def _train_rows(
        self, rows: np.ndarray, sequences: Rollouts, old: dict[str, torch.Tensor], begun: list[torch.Tensor] | None
    ) -> dict[str, object]:
        """Forward pass over one mini batch, unless it has `begun`, and backward pass; the optimiser moves where accumulation is complete."""
        logprobs, entropies, values = begun or self._forward_rows(rows, sequences)
        loss, stats = self._loss(old, logprobs, entropies, values)
        _require_finite("the loss", loss)
        with self._arranged(self.model, sequences, rows):  # checkpointed layers run again
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
        # TRL makes plain numbers of the lengths' statistics, which are this rank's too.
        lengths = {f"tokens/{what}_len_{part}" for what in ("queries", "responses") for part in ("mean", "std")}
        names = [name for name, value in stats.items() if name in lengths or (isinstance(value, torch.Tensor) and name not in arrays)]
        together = torch.stack([torch.as_tensor(stats[name]).detach().double().reshape(()).to(self.accelerator.device) for name in names])
        dist.all_reduce(together, dist.ReduceOp.SUM)
        return {**stats, **dict(zip(names, (together / self.accelerator.num_processes).float().cpu()))}


def _require_finite(what: str, value: torch.Tensor) -> None:
    """Raises FloatingPointError before the optimiser moves: the weights stay as they were."""
    if not math.isfinite(value.item()):
        raise FloatingPointError(f"{what} is {value.item()}")
