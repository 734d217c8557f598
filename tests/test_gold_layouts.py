"""Reward models as they are shipped: the score is what the model's own documented call gives for one row without padding."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CHATML, ROWS
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, AutoTokenizer

from parts.batching import pad
from parts.conversations import encode_row
from parts.errors import InputError
from parts.files import read_json
from parts.gold_models import GoldSettings, LazyGold, load_gold_reward_model

BATCH = {"query": [row["input"] for row in ROWS], "response": [row["output"] for row in ROWS]}
PAIRS = list(zip(*BATCH.values()))
ENDS_IN_EOS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
SMALL = {
    "vocab_size": 410,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}


def documented(model, tokenizer, pairs=PAIRS) -> list[float]:
    """One row at a time, as model cards have it."""
    scores = []
    for query, response in pairs:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
            inputs = tokenizer.apply_chat_template(turns, tokenize=True, return_tensors="pt", return_dict=True)
        else:
            inputs = tokenizer(query, response, return_tensors="pt")
        with torch.no_grad():
            scores.append(model(**inputs).logits[0, 0].item())
    return scores


@pytest.fixture(scope="module")
def tokenizer_of(tiny_model, tmp_path_factory):
    """A folder with the tiny tokenizer, as asked."""

    def make(template: str | None = CHATML, pad: str | None = "<|im_end|>", types: bool = False):
        folder = tmp_path_factory.mktemp("layout") / "model"
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = template
        if template is None and not types:
            ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="$A <|im_end|>",
                pair="$A <|im_start|> $B <|im_end|>",
                special_tokens=list(zip(["<|im_start|>", "<|im_end|>"], ids)),
            )
        if types:
            tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
            ids = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(zip(["[CLS]", "[SEP]"], ids))
            )
        else:
            tokenizer.pad_token = pad
        tokenizer.save_pretrained(folder)
        known = read_json(folder / "tokenizer_config.json")
        known |= {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]} if types else {}
        known = {name: value for name, value in known.items() if pad is not None or name != "pad_token"}
        (folder / "tokenizer_config.json").write_text(json.dumps(known), encoding="utf-8")
        return folder

    return make


def model_in(folder, family: str, **more):
    """A random reward model of a family, saved beside the folder's tokenizer."""
    torch.manual_seed(3)
    config = CONFIG_MAPPING[family](**{**SMALL, "num_labels": 1, "bos_token_id": 1, "eos_token_id": 2, **more})
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if name.split(".")[0] in ("score", "classifier"):
            torch.nn.init.normal_(weight, std=1.0)
    model.config.pad_token_id = more.get("pad_token_id")
    model.save_pretrained(folder)
    return folder


GENERIC = {"num_key_value_heads": 2}
LAYOUTS = {
    "no padding, ends in EOS": (lambda make: make(ENDS_IN_EOS, None), "llama", GENERIC),
    "no padding in the model alone": (lambda make: make(ENDS_IN_EOS), "qwen2", GENERIC),
    "padding is EOS": (lambda make: make(ENDS_IN_EOS), "llama", {**GENERIC, "pad_token_id": 2}),
    "padding of -1": (lambda make: make(ENDS_IN_EOS), "mistral", {**GENERIC, "pad_token_id": -1}),
    "another padding": (lambda make: make(CHATML), "qwen3", {**GENERIC, "pad_token_id": 7, "head_dim": 8}),
    "gemma": (lambda make: make(CHATML), "gemma2", {**GENERIC, "pad_token_id": 0, "head_dim": 8}),
    "absolute positions": (lambda make: make(CHATML, None), "gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "hidden_size": 32}),
    "pairs with types": (lambda make: make(None, types=True), "bert", {"pad_token_id": 403}),
    "pairs without types": (lambda make: make(None), "roberta", {"pad_token_id": 2, "max_position_embeddings": 100, "type_vocab_size": 1}),
    "deberta": (lambda make: make(None, types=True), "deberta-v2", {"pad_token_id": 403, "type_vocab_size": 2}),
}


def reward_model(tokenizer_of, name: str):
    make, family, more = LAYOUTS[name]
    return model_in(make(tokenizer_of), family, **more)


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_are_those_of_the_documented_call(tokenizer_of, name):
    folder = reward_model(tokenizer_of, name)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = documented(model, AutoTokenizer.from_pretrained(folder))
    gold = load_gold_reward_model(str(folder), device="cpu")
    assert LazyGold(str(folder), "cpu", 8, GoldSettings()).facts == gold.facts
    assert len({round(score, 4) for score in expected}) == len(ROWS)
    assert gold.get_reward(BATCH) == pytest.approx(expected, abs=1e-4)
    one = load_gold_reward_model(str(folder), device="cpu", batch_size=1)
    assert one.get_reward(BATCH) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("limit", [512, 19])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_rows_begin_with_is_read_once(tokenizer_of, name, limit, monkeypatch):
    """By models that can be packed, in rows up to a limit. The scores stay the documented call's."""
    monkeypatch.setattr("parts.packing.MOST_TOKENS", limit)
    folder = reward_model(tokenizer_of, name)
    pairs = [(row["input"], other["output"]) for row in ROWS[:2] for other in ROWS]
    expected = documented(AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), pairs)
    gold = load_gold_reward_model(str(folder), device="cpu")
    read = []
    gold.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].shape))
    assert gold.get_reward({"query": [query for query, _ in pairs], "response": [text for _, text in pairs]}) == pytest.approx(
        expected, abs=1e-4
    )
    lengths = [len(gold.encode(*pair)[0]) for pair in pairs]
    short = [length for length in lengths if length <= limit and LAYOUTS[name][1] in ("llama", "qwen2", "qwen3", "mistral", "gpt2")]
    assert sum(rows for rows, _ in read if rows > 1) == len(pairs) - len(short)
    assert sum(tokens for rows, tokens in read if rows == 1) <= 0.6 * sum(short)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_scores_are_those_of_a_padded_batch(tokenizer_of, side):
    folder = reward_model(tokenizer_of, "another padding")
    gold = load_gold_reward_model(str(folder), device="cpu")
    ids, mask = pad([gold.encode(*pair)[0] for pair in PAIRS], 7, side)
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(folder).eval()(input_ids=ids, attention_mask=mask).logits[:, 0]
    assert gold.get_reward(BATCH) == pytest.approx(expected.tolist(), abs=1e-4)


def test_an_adapters_own_tokenizer_and_template(tiny_model, tmp_path):
    """As TRL's RewardTrainer saves one, with the base's tokenizer of another template beside its base."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]))
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    fresh = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    fresh.config.pad_token_id = None
    expected = documented(PeftModel.from_pretrained(fresh, tmp_path).eval(), tokenizer)
    gold = load_gold_reward_model(str(tmp_path), device="cpu")
    assert gold.get_reward(BATCH) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("task", "head"), [("CAUSAL_LM", True), ("SEQ_CLS", False), (None, False)])
def test_an_adapter_without_the_head_or_of_another_task_is_refused(tiny_model, tmp_path, task, head):
    from safetensors.torch import load_file, save_file

    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = read_json(tmp_path / "adapter_config.json")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "task_type": task}), encoding="utf-8")
    if not head:
        weights = load_file(tmp_path / "adapter_model.safetensors")
        save_file({name: weight for name, weight in weights.items() if "score" not in name}, tmp_path / "adapter_model.safetensors")
    message = "no weights for score.weight, expected a trained reward model" if not head else "task_type is 'CAUSAL_LM', expected SEQ_CLS"
    with pytest.raises(InputError, match=message):
        load_gold_reward_model(str(tmp_path), device="cpu")


def test_a_template_that_demands_a_system_turn(tokenizer_of):
    demand = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn comes first') }}{% endif %}"
    folder = model_in(tokenizer_of(demand + CHATML), "llama", **GENERIC)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    inputs = tokenizer.apply_chat_template(turns, tokenize=True, return_tensors="pt", return_dict=True)
    gold = load_gold_reward_model(str(folder), device="cpu")
    assert gold.get_reward({"query": ["ab"], "response": ["cd"]}) == pytest.approx([model(**inputs).logits.item()], abs=1e-5)


def test_what_is_cut_from_a_long_row(tokenizer_of, tiny_model):
    """The model's own limit counts where the tokenizer names none, and the first CLS or BOS stays."""
    folder = model_in(tokenizer_of(None, types=True), "bert", pad_token_id=403, max_position_embeddings=40)
    gold = load_gold_reward_model(str(folder), device="cpu")
    ids, types = gold.encode("rain " * 60, "tin " * 60)
    assert gold.max_length == len(ids) == len(types) == 40
    assert ids[0] == gold.tokenizer.cls_token_id and ids[-1] == gold.tokenizer.sep_token_id and set(types) == {0, 1}
    assert gold.get_reward({"query": ["rain " * 60], "response": ["tin " * 60]})[0] != 0
    roberta = model_in(tokenizer_of(None), "roberta", pad_token_id=2, max_position_embeddings=40, type_vocab_size=1)
    assert load_gold_reward_model(str(roberta), device="cpu").max_length == 37  # its positions start after the padding's
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    whole, _ = encode_row(tokenizer, "rain " * 60, "tin " * 9, 999)
    cut, _ = encode_row(tokenizer, "rain " * 60, "tin " * 9, 30)
    assert cut == [400, *whole[-29:]] and whole[0] == 400


def test_a_configuration_inside_another(tokenizer_of):
    """A multimodal model's text settings hold its padding and its limit."""
    folder = tokenizer_of(ENDS_IN_EOS, None)
    from transformers import Gemma3Config

    text = {**SMALL, **GENERIC, "head_dim": 8, "max_position_embeddings": 120, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(3)
    config = Gemma3Config(text_config=text, vision_config=vision, num_labels=1, mm_tokens_per_image=4, image_token_index=409)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    torch.nn.init.normal_(model.score.weight, std=1.0)
    model.save_pretrained(folder)
    expected = documented(AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
    gold = load_gold_reward_model(str(folder), device="cpu")
    assert gold.max_length == 120
    assert gold.get_reward(BATCH) == pytest.approx(expected, abs=1e-4)


def test_a_lora_is_merged_in_single_precision_alone(tiny_gold, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_gold)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path)
    whole = load_gold_reward_model(str(tmp_path), device="cpu")
    assert not isinstance(whole.model, PeftModel)
    half = load_gold_reward_model(str(tmp_path), device="cpu", settings=GoldSettings(gold_dtype="bfloat16"))
    assert isinstance(half.model, PeftModel)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_gold, dtype=torch.bfloat16)
    alone = documented(PeftModel.from_pretrained(plain, tmp_path).eval(), half.tokenizer)
    assert LazyGold(str(tmp_path), "cpu", 8, half.settings).facts == half.facts
    assert half.get_reward(BATCH) == pytest.approx(alone, abs=1e-3)
    assert whole.get_reward(BATCH) == pytest.approx(alone, abs=1e-3)
