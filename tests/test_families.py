"""The zoo: one small model of each family, sampled beside transformers' `generate` and stepped beside TRL's `step`."""

from __future__ import annotations

import functools
import inspect
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import logprobs_from_logits

from parts import cpu_speed
from parts.errors import InputError
from parts.generation import generate_responses
from parts.kv_batches import Batch
from parts.logprobs import TokenLogProbs, WayToLogits
from parts.ppo_trainer import FastPPOTrainer
from parts.sampling import Decoding, check_sampling

VOCABULARY = 300
# What each configuration class calls its sizes; each takes the names that it has.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "embedding_size": 32,
    "intermediate_size": 64, "ffn_dim": 64, "decoder_ffn_dim": 64, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "max_position_embeddings": 256, "n_positions": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True, "initializer_range": 0.2, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "state_size": 8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_ssm": 64, "lru_width": 32,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip


def build(family: str, **more):
    """A random model of a family, in eval mode."""
    kind = CONFIG_MAPPING[family]
    default, parameters = kind(), inspect.signature(kind.__init__).parameters
    names = [
        name for name in SIZES if (name in parameters or hasattr(default, name)) and not isinstance(getattr(kind, name, None), property)
    ]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{name: SIZES[name] for name in names} | more), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = 2
    return model


TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"t{token}": token for token in range(VOCABULARY)}, unk_token="t3")),
    pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t3", padding_side="right",
)  # fmt: skip
FAMILIES: dict[str, dict] = {name: {} for name in (
    "apertus", "arcee", "bloom", "cohere", "cohere2", "deepseek_v3", "exaone4", "falcon", "gemma", "gemma2", "glm4", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "llama", "mistral", "mixtral", "mpt", "nemotron", "olmo",
    "olmo2", "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm",
    "starcoder2", "bamba", "falcon_h1", "jamba", "lfm2", "mamba", "mamba2", "qwen3_next", "zamba", "zamba2",
)}  # fmt: skip
FAMILIES |= {
    "granite": {"logits_scaling": 8.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "attention_head_dim": 16},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_mem_blocks": 2,
        "adapter_rank": 4,
        "use_shared_attention_adapter": True,
        "use_mem_rope": True,
        "chunk_size": 8,
    },
}
REFUSED = ("recurrent_gemma", "rwkv")
BATCH = 4


@pytest.fixture(scope="module")
def built():
    """Models by family, each built once."""
    return functools.cache(lambda family: build(family, **FAMILIES[family]))


GRAPHED = set(FAMILIES) - {  # the others' attention, or what they keep, is more than a mask and all keys and values
    "bloom", "cohere2", "exaone4", "falcon", "gemma2", "gpt_neo", "gpt_oss", "gptj", "mistral", "mpt", "opt", "bamba", "falcon_h1", "jamba",
    "lfm2", "mamba", "mamba2", "qwen3_next", "zamba", "zamba2",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_of_fixed_shapes_sample_the_same(built, family, fixed_passes):
    """As a GPU repeats them; models that cannot be read this way are read as on a CPU."""
    seen = []
    handle = built(family).register_forward_pre_hook(lambda *given: seen.append(given[2].get("attention_mask")), with_kwargs=True)
    test_greedy_samples_are_those_of_generate_alone(built, family)
    handle.remove()
    fixed = sum(mask is not None and mask.ndim == 4 and mask.shape[2] == 1 for mask in seen)
    assert fixed > 10 if family in GRAPHED else fixed <= 1  # a pass may show that there shall be no other


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_samples_are_those_of_generate_alone(built, family):
    """With padding, a cache, and rows that leave the batch, token by token."""
    model, draw = built(family), torch.Generator().manual_seed(1)
    check_sampling(model)
    prompts = [torch.randint(4, VOCABULARY, (length,), generator=draw).tolist() for length in (3, 7, 5, 5, 1, 9)]
    alone = []
    for prompt in prompts:
        new = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)[0]
        alone.append(new[len(prompt) :].tolist())
    ends = {2, alone[0][2], alone[3][4]}
    places = [next((place for place, token in enumerate(row) if token in ends), 7) for row in alone]
    expected = [row[: place + 1] for row, place in zip(alone, places)]
    assert generate_responses(model, TOKENIZER, prompts, Decoding(8, temperature=0), 5, seed=0, ends=ends) == expected


FUSED = {  # their attention has another way, or options that plain products do not know
    "bloom", "falcon", "gemma2", "gpt_neo", "gpt_oss", "gptj", "mamba", "mamba2", "mpt",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_to_one_token_samples_the_same(built, family, monkeypatch):
    """As a CPU computes it in bf16, here in fp32."""
    products, attention, plain = [], cpu_speed._attention_to_one, []
    bmm = torch.bmm
    monkeypatch.setattr(cpu_speed, "_has_fast_half", lambda model: True)
    monkeypatch.setattr(torch, "bmm", lambda *given: products.append(given) or bmm(*given))

    def counted(*given, **options):
        before = len(products)
        found = attention(*given, **options)
        plain.append(len(products) > before)
        return found

    monkeypatch.setattr(cpu_speed, "_attention_to_one", counted)
    test_greedy_samples_are_those_of_generate_alone(built, family)
    assert any(plain) == (family not in FUSED)


def of_large_scores() -> torch.nn.Module:
    """A Qwen2 in bf16 whose keys and queries have large biases, as those of the hub have."""
    model = build("qwen2", **FAMILIES["qwen2"])
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            bias = projection.bias.data.view(-1, layer.self_attn.head_dim)
            bias[:, layer.self_attn.head_dim // 2 - 1] = bias[:, -1] = 80  # of the slowest rotation
    return model.to(torch.bfloat16)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 products on this CPU")
def test_large_scores_are_not_rounded_to_bf16(monkeypatch):
    model = of_large_scores()
    ids = torch.randint(4, VOCABULARY, (8, 21), generator=torch.Generator().manual_seed(0))

    def last_logits(attention) -> torch.Tensor:
        with torch.no_grad(), attention(model):
            return model(ids[:, -1:], past_key_values=model(ids[:, :-1]).past_key_values).logits

    check_sampling(model)
    assert torch.equal(last_logits(cpu_speed.attention_to_one), last_logits(nullcontext))
    monkeypatch.setattr(cpu_speed, "LARGEST_SCORE", torch.inf)
    assert not torch.equal(last_logits(cpu_speed.attention_to_one), last_logits(nullcontext))


@pytest.mark.parametrize("most", [5, 100])
def test_prompts_in_any_order_are_read_as_each_alone(built, most, monkeypatch):
    """In groups of about one length, and in one; a prompt that comes twice is read once."""
    monkeypatch.setattr(cpu_speed, "TOKENS", most)
    model, prompts = built("llama"), [[5, 6], [7, 8, 9, 10], [11, 12, 13], [5, 6]]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([prompt])).logits[:, -1] for prompt in prompts])
        batch = Batch(model, prompts)
        torch.testing.assert_close(batch.logits, alone, rtol=0, atol=1e-5)
        batch.read(torch.tensor([14, 15, 16, 17]))
        alone = torch.cat([model(input_ids=torch.tensor([[*prompt, 14 + row]])).logits[:, -1] for row, prompt in enumerate(prompts)])
        torch.testing.assert_close(batch.logits, alone, rtol=0, atol=1e-5)


def policy(family: str, **more):
    """A policy with LoRA that is not its reference."""
    model = build(family, **FAMILIES.get(family, {}) | more).requires_grad_(False)
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
    targets = sorted(linear & {"q_proj", "v_proj", "query_key_value", "c_attn", "Wqkv", "qkv_proj", "in_proj", "q_a_proj", "in_proj_qkvz"})
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, lora_dropout=0.0, target_modules=targets)
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=lora)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return wrapped


def stepped(cls, family: str, **more) -> tuple[dict, dict, object]:
    """Statistics and weights after one step, and the trainer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PPOConfig(batch_size=BATCH, mini_batch_size=2, ppo_epochs=1, learning_rate=1e-3)
        trainer = cls(config, policy(family, **more), ref_model=None, tokenizer=TOKENIZER)
        draw = torch.Generator().manual_seed(0)
        queries = [torch.randint(4, VOCABULARY, (length,), generator=draw) for length in (3, 7, 5, 9)]
        responses = [torch.randint(4, VOCABULARY, (length,), generator=draw) for length in (1, 8, 5, 3)]
        np.random.seed(0)
        stats = trainer.step(queries, responses, list(torch.randn(BATCH, generator=draw)))
    return stats, {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}, trainer


def test_attention_that_rounds_too_much_is_left_out(monkeypatch):
    """PPO's plain attention in bf16: where log-probabilities come out otherwise, the model's own is taken."""

    def check(model, forward, attention):
        if attention is cpu_speed.short_sequences:
            raise InputError("0.5 nats off")

    monkeypatch.setattr("parts.ppo_trainer.check_log_probabilities", check)
    assert stepped(FastPPOTrainer, "llama")[2].attention is nullcontext
    monkeypatch.undo()
    assert stepped(FastPPOTrainer, "llama")[2].attention is cpu_speed.short_sequences


ARRAYS = ("objective/logprobs", "objective/ref_logprobs", "ppo/policy/advantages", "ppo/policy/ratio")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_trl(family):
    theirs, weights, _ = stepped(PPOTrainer, family)
    ours, found, _ = stepped(FastPPOTrainer, family)
    for name, value in theirs.items():
        if not name.startswith("time/") and name not in ARRAYS:
            np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_keep_other_things_are_refused(family):
    with pytest.raises(InputError, match="sampl"):
        check_sampling(build(family))


# -------------------------------------------------------------------------------------------------- from states to logits


@pytest.mark.parametrize(
    ("family", "more", "is_product"),
    [
        ("llama", {}, True),
        ("granite", {"logits_scaling": 1.0}, True),
        ("granite", {"logits_scaling": 8.0}, False),
        ("cohere", {"logit_scale": 0.0625}, False),
        ("gemma2", {"final_logit_softcapping": 2.0}, False),
        ("opt", {"word_embed_proj_dim": 16}, True),
    ],
)
def test_log_probabilities_and_their_gradient(monkeypatch, family, more, is_product):
    """Against autograd through the model's own logits, with chunks of three tokens in pieces of two."""
    monkeypatch.setattr("parts.logprobs.LOGITS_PER_CHUNK", 3 * VOCABULARY)
    monkeypatch.setattr("parts.logprobs.LOGITS_IN_CACHE", 2 * VOCABULARY)
    model = build(family, **more).requires_grad_(False)
    way = WayToLogits(model)
    assert way.is_product == is_product
    ids = torch.randint(4, VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(0))
    captured = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    hidden = (captured * 9).requires_grad_()
    weights = torch.randn(10, generator=torch.Generator().manual_seed(1))
    logprobs, entropies = TokenLogProbs.apply(hidden, ids[0, 1:], way)
    (logprobs * weights).sum().backward()
    ours, hidden.grad = hidden.grad.clone(), None
    logits = way(hidden)
    torch.testing.assert_close(way(captured), model(input_ids=ids, use_cache=False).logits[0, :-1])
    expected = logprobs_from_logits(logits[None], ids[:, 1:])[0]
    (expected * weights).sum().backward()
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(ours, hidden.grad)
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(entropies, -(probabilities * probabilities.log()).sum(-1))


def test_a_way_that_is_not_the_models_own_is_told_at_the_start(monkeypatch):
    """A backbone whose output is not what the head gets: a scale in front of it."""
    model = build("llama")
    own = model.forward

    def scaled(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = output.logits * (1.0 if kwargs["input_ids"].eq(0).all() else 3.0)
        return output

    scaled.__signature__ = inspect.signature(own)
    model.forward = scaled
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(
        model.requires_grad_(False), peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    with pytest.raises(InputError, match="PPO's log-probabilities are .* nats off the model's own"):
        FastPPOTrainer(PPOConfig(batch_size=2, mini_batch_size=1), wrapped, tokenizer=TOKENIZER)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "more"), [("opt", {"dropout": 0.1}), ("gpt_neo", {"resid_dropout": 0.1}), ("xglm", {"dropout": 0.1})])
def test_dropout_of_layers_never_acts(family, more, checkpointing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1, gradient_checkpointing=checkpointing)
        trainer = FastPPOTrainer(config, policy(family, **more), ref_model=None, tokenizer=TOKENIZER)
        stats = trainer.step([torch.tensor([5, 6, 7])] * 2, [torch.tensor([9, 10, 11, 12])] * 2, [torch.tensor(0.0), torch.tensor(1.0)])
    np.testing.assert_allclose(stats["ppo/policy/ratio"], 1.0, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- not a number


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_sampling_and_name_the_row(value):
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = value
    prompts = [[5, 6], [9], [8, 77, 7], [4, 4]]
    finished = []
    with pytest.raises(FloatingPointError, match="row 13: the logits of token 1 are (nan|inf), expected numbers"):
        generate_responses(
            model, TOKENIZER, prompts, Decoding(4), 4, seed=0, rows=[10, 11, 12, 13], finished=lambda *row: finished.append(row)
        )
    assert finished == []
