"""Gold reward models: the real checkpoint layouts on tiny models, against scores worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import ROWS, run_script
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import train_gold_rm
from parts.batching import batches_by_length
from parts.bradley_terry import bradley_terry_loss
from parts.conversations import encode_conversation
from parts.errors import InputError
from parts.files import REPOSITORY, code_digest, file_digest, read_json
from parts.gold_models import (
    GoldSettings,
    LazyGold,
    SequenceClassificationRMForInference,
    StarlingRMForInference,
    load_gold_reward_model,
)
from parts.gold_settings import is_starling
from parts.models import model_identity
from parts.preferences import (
    CUT,
    DAMAGES,
    FOREIGN,
    Pair,
    accuracies,
    by_prompt,
    damaged_pairs,
    encode_rankings,
    heldout_sample,
    implied,
    select_pairs,
)
from parts.rows import is_heldout

BATCH = {"query": [row["input"] for row in ROWS], "response": [row["output"] for row in ROWS]}


@pytest.fixture(scope="module")
def starling(tiny_model, tmp_path_factory):
    """A checkpoint as Starling-RM is published: the trunk under `transformer.`, the head `v_head`, no class of ours in its config."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("starling")
    trunk = load_file(tiny_model / "model.safetensors")
    weights = {name.replace("model.", "transformer.", 1): value for name, value in trunk.items() if name.startswith("model.")}
    weights["v_head.weight"] = torch.linspace(-1, 1, 32)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(tiny_model / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPTRewardModel"]}), encoding="utf-8")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def hand_score(folder, text: str, limit: int = 2048) -> float:
    """The trunk's last hidden state at the last token, times the head: one row, no padding, no code of ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = load_file(folder / "model.safetensors")
    trunk = AutoModelForCausalLM.from_config(_config(folder))
    trunk.load_state_dict(
        {name.replace("transformer.", "model.", 1): value for name, value in weights.items() if "v_head" not in name}, strict=False
    )
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][-limit:]
    with torch.no_grad():
        hidden = trunk.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return float(hidden @ weights["v_head.weight"][0])


def _config(folder):
    from transformers import LlamaConfig

    return LlamaConfig.from_pretrained(folder)


def test_starling_scores_the_last_token(starling):
    gold = load_gold_reward_model(str(starling), device="cpu", batch_size=4)
    assert isinstance(gold, StarlingRMForInference)
    assert LazyGold(str(starling), "cpu", 4, GoldSettings()).facts == gold.facts
    scores = gold.get_reward(BATCH)
    texts = [f"<|im_start|>user\n{row['input']}<|im_end|>\n<|im_start|>assistant\n{row['output']}<|im_end|>" for row in ROWS]
    assert scores == pytest.approx([hand_score(starling, text) for text in texts], rel=1e-4, abs=1e-5)
    assert gold.get_reward({name: values[:1] for name, values in BATCH.items()}) == pytest.approx(scores[:1], rel=1e-5)


def test_starling_truncates_on_the_left_and_can_wrap_as_published(starling):
    short = StarlingRMForInference(str(starling), tokenizer_name=str(starling), device="cpu", max_length=10)
    text = f"<|im_start|>user\n{ROWS[0]['input']}<|im_end|>\n<|im_start|>assistant\n{ROWS[0]['output']}<|im_end|>"
    one = {name: values[:1] for name, values in BATCH.items()}
    assert short.get_reward(one) == pytest.approx([hand_score(starling, text, limit=10)], rel=1e-4)
    wrapped = StarlingRMForInference(str(starling), tokenizer_name=str(starling), device="cpu",
                                     settings=GoldSettings(human_assistant_prefix=True))  # fmt: skip
    text = text.replace(ROWS[0]["input"], f"\n\nHuman: {ROWS[0]['input']}\n\nAssistant: ")
    assert wrapped.get_reward(one) == pytest.approx([hand_score(starling, text)], rel=1e-4)


def test_sequence_classification_alone_and_in_batches(tiny_gold):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    gold = load_gold_reward_model(str(tiny_gold), device="cpu", batch_size=2)
    assert isinstance(gold, SequenceClassificationRMForInference)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(tiny_gold), AutoTokenizer.from_pretrained(tiny_gold)
    expected = []
    for row in ROWS:
        chat = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), return_tensors="pt")
        with torch.no_grad():
            expected.append(model(**ids).logits[0, 0].item())
    assert gold.get_reward(BATCH) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_batches_by_length():
    # sorted: 10, 10, 20, 30, 90; two rows of 30 would hold 60 tokens, and the row of 90 is over the budget by itself
    assert batches_by_length([30, 10, 90, 20, 10], 8, 59) == [[1, 4], [3], [0], [2]]
    assert batches_by_length([30, 10, 90, 20, 10], 8, 60) == [[1, 4, 3], [0], [2]]
    assert batches_by_length([30, 10, 90, 20, 10], 2, 1000) == [[1, 4], [3, 0], [2]]


def test_rewards_batch_by_batch(tiny_gold):
    gold = load_gold_reward_model(str(tiny_gold), device="cpu", settings=GoldSettings(gold_batch_tokens=60))
    found = dict(pair for rows, scores in gold.iter_rewards(BATCH) for pair in zip(rows, scores))
    assert [found[row] for row in range(len(ROWS))] == gold.get_reward(BATCH)
    assert len(list(gold.iter_rewards(BATCH))) > 1


def test_batches_are_smaller_on_a_cpu(tiny_gold, monkeypatch):
    gold = load_gold_reward_model(str(tiny_gold), device="cpu")
    assert len(list(gold.iter_rewards(BATCH))) == 1
    monkeypatch.setattr("parts.cpu_speed.TOKENS", 60)
    assert len(list(gold.iter_rewards(BATCH))) > 1


def test_weights_in_8_bits(starling, tiny_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(2)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["up_proj"], modules_to_save=["score"], init_lora_weights=False)
    get_peft_model(AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1), lora).save_pretrained(tmp_path)
    settings = GoldSettings(load_in_8bit=True)
    for folder in (starling, tmp_path):
        exact = load_gold_reward_model(str(folder), device="cpu")
        rounded = load_gold_reward_model(str(folder), device="cpu", settings=settings)
        kinds = {name: type(module).__name__ for name, module in rounded.model.named_modules()}
        assert "Linear8bitLt" in kinds.values()
        assert not [name for name, kind in kinds.items() if kind == "Linear8bitLt" and ("v_head" in name or "score" in name)]
        assert any("lora_A" in name for name in kinds) == (folder == tmp_path)  # not merged into 8 bits
        assert rounded.get_reward(BATCH) == pytest.approx(exact.get_reward(BATCH), abs=0.05)
        assert rounded.facts != exact.facts


def test_scores_in_bfloat16(tiny_gold):
    exact = load_gold_reward_model(str(tiny_gold), device="cpu")
    rounded = load_gold_reward_model(str(tiny_gold), device="cpu", settings=GoldSettings(gold_dtype="bfloat16"))
    assert rounded.facts == {**exact.facts, "dtype": "bfloat16"}
    scores = rounded.get_reward(BATCH)
    assert scores != exact.get_reward(BATCH)
    assert scores == pytest.approx(exact.get_reward(BATCH), abs=0.02)


def test_what_a_gold_score_depends_on(tiny_gold, tmp_path):
    import shutil

    gold = load_gold_reward_model(str(tiny_gold), device="cpu")
    source = code_digest(REPOSITORY / "parts/gold_models.py", REPOSITORY / "parts/conversations.py")
    assert gold.facts == {"gold": model_identity(str(tiny_gold)), "source": source, "commit": None, "dtype": "float32", "max_length": 512,
                          "load_in_8bit": False, "load_in_4bit": False, "human_assistant_prefix": False}  # fmt: skip
    settings = GoldSettings(gold_dtype="float32", gold_batch_tokens=60)
    assert load_gold_reward_model(str(tiny_gold), device="cpu", settings=settings).facts == gold.facts  # these are a matter of speed
    copy = tmp_path / "copy"
    shutil.copytree(tiny_gold, copy)
    assert load_gold_reward_model(str(copy), device="cpu").facts == gold.facts
    (copy / "config.json").write_text((copy / "config.json").read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert load_gold_reward_model(str(copy), device="cpu").facts != gold.facts


def test_unusable_gold_settings(monkeypatch):
    with pytest.raises(InputError, match="--load_in_8bit and --load_in_4bit are both set"):
        GoldSettings(load_in_8bit=True, load_in_4bit=True).check_gold([])
    with pytest.raises(InputError, match="--gold_dtype is 'int8', expected bfloat16 or float32"):
        GoldSettings(gold_dtype="int8").check_gold([])
    with pytest.raises(InputError, match="--gold_batch_tokens is 0, expected at least 1"):
        GoldSettings(gold_batch_tokens=0).check_gold([])
    with pytest.raises(InputError, match="human_assistant_prefix is for Starling"):
        GoldSettings(human_assistant_prefix=True).check_gold(["owner/another-model"])
    GoldSettings(human_assistant_prefix=True).check_gold(["Nexusflow/Starling-RM-34B", "owner/another-model"])
    with pytest.raises(InputError, match="--gold_dtype is for gold models, and none is to score"):
        GoldSettings(gold_dtype="float32").check_gold([])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="need bitsandbytes, which is not installed"):
        GoldSettings(load_in_4bit=True).check_gold([])


def test_pairs_of_texts_without_a_chat_template(tiny_gold):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_gold)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="its tokenizer has no chat template, and nothing that ends a pair of texts"):
        encode_conversation(tokenizer, "ab", "cd", 99)  # "abcd" to the model, as any other halves of it would be
    first, last = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    specials = [("<|im_start|>", first), ("<|im_end|>", last)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(pair="$A <|im_start|> $B <|im_end|>", special_tokens=specials)
    ids = encode_conversation(tokenizer, "ab", "cd", 99)
    assert tokenizer.decode(ids) == "ab<|im_start|>cd<|im_end|>" and ids == tokenizer("ab", "cd")["input_ids"]


def test_a_model_without_a_reward_head_is_refused(tiny_model):
    with pytest.raises(InputError, match="no weights for score.weight, expected a trained reward model"):
        load_gold_reward_model(str(tiny_model), device="cpu")


def test_an_adapter_without_its_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/none"}), encoding="utf-8")
    with pytest.raises(InputError, match="models/none: no such folder, .*parts.bundled_models"):
        load_gold_reward_model(str(tmp_path), device="cpu")


def test_weights_that_are_none_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(InputError, match="model.safetensors: cannot be loaded as a model's weights"):
        is_starling(str(tmp_path))


def test_a_policy_is_no_reward_model(tiny_model, tmp_path):
    config = {"base_model_name_or_path": str(tiny_model), "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="task_type is 'CAUSAL_LM', expected SEQ_CLS"):
        load_gold_reward_model(str(tmp_path), device="cpu")


def test_bradley_terry_loss():
    # -log sigmoid(1) = 0.31326, -log sigmoid(-2) = 2.12693
    assert bradley_terry_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0])).item() == pytest.approx(
        (0.313262 + 2.126928) / 2, abs=1e-5
    )


def test_training_pairs_are_balanced():
    import random

    pairs = [Pair(f"q{n}", "long answer, longer than the other one", "short") for n in range(90)]
    pairs += [Pair(f"r{n}", "brief and good", "long answer that was not preferred") for n in range(30)]
    selected = select_pairs(pairs, 40, lambda pair: pair.instruction != "q0", random.Random(0))
    assert len(selected) == 40 and sum(pair.longer_wins for pair in selected) == 20
    assert "q0" not in {pair.instruction for pair in selected}
    assert len(select_pairs(pairs, 200, lambda pair: True, random.Random(0))) == 60  # the shorter wins 30 of them
    natural = select_pairs(pairs, 200, lambda pair: pair.instruction != "q0", random.Random(0), balanced=False)
    assert sum(pair.longer_wins for pair in natural) == 89 and len(natural) == 119
    assert len(select_pairs(pairs, 40, lambda pair: True, random.Random(0), balanced=False)) == 40


def test_damages():
    import random

    pairs = [Pair(f"q{n}", f"answer number {n} has quite a few words in it so that it can be cut", "worse") for n in range(3)]
    foreign, repeated, cut = damaged_pairs(pairs, DAMAGES, random.Random(0))
    assert foreign.rejected == pairs[1].chosen
    assert repeated.kind == "repetition" and len(repeated.rejected) >= len(pairs[1].chosen)
    assert pairs[2].chosen.startswith(cut.rejected) and len(cut.rejected) < len(pairs[2].chosen)
    assert [pair.kind for pair in damaged_pairs(pairs[:1], (FOREIGN,), random.Random(0))] == [CUT]  # there is no other prompt


def test_rankings():
    import random

    text = "answer {} has quite a few words in it so that it can be cut"
    pairs = [Pair("q", text.format("one"), "middling"), Pair("q", "middling", "worst"), Pair("r", text.format("two"), "worse")]
    groups = by_prompt(pairs, 2)
    assert groups == [pairs[:2], pairs[2:]]
    first, second = encode_rankings(groups, lambda instruction, text: [len(text)], random.Random(0))
    # Three answers in order, two foreign answers below all of them, and the best one's repetition below itself.
    assert len(first["sequences"]) == 6
    assert first["sequences"][:5] == [[len(pair)] for pair in (pairs[0].chosen, "middling", "worst", pairs[2].chosen, pairs[2].chosen)]
    assert first["comparisons"] == [
        {"kind": "preference", "pairs": [(0, 1), (0, 2), (1, 2)]},
        {"kind": FOREIGN, "pairs": [(0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4)]},
        {"kind": "repetition", "pairs": [(0, 5)]},
    ]
    assert second["comparisons"][2] == {"kind": CUT, "pairs": [(0, 4)]}
    assert [len(group) for group in by_prompt(pairs * 2, 3)] == [3, 1, 2]
    undamaged, _ = encode_rankings(groups, lambda instruction, text: [len(text)], random.Random(0), damaged_texts=False)
    assert undamaged["comparisons"] == first["comparisons"][:1] and undamaged["sequences"] == first["sequences"][:3]


def test_what_comparisons_imply():
    assert implied({(0, 1), (1, 2)}) == {(0, 1), (1, 2), (0, 2)}
    assert implied({(0, 1), (2, 1)}) == {(0, 1), (2, 1)}  # two that beat the same one are not ordered
    assert implied({(0, 1), (1, 2), (2, 0)}) == {(0, 1), (1, 2), (2, 0)}  # a circle implies nothing new


def test_what_is_measured_on():
    pairs = [Pair(f"q{n}", f"{n:02} one two three four", "five" * (1 + 4 * (n % 2))) for n in range(20)]
    sample = heldout_sample(pairs, 8)
    assert [pair.kind for pair in sample[:8]] == ["preference"] * 8
    similar = [pair for pair in sample if pair.kind == "similar length"]
    assert 0 < len(similar) <= 4 and all(pair.similar_length for pair in similar)
    assert len({pair.instruction for pair in sample[:8] + similar}) == 8 + len(similar)
    assert [pair.kind for pair in sample[8 + len(similar) :]] == [*DAMAGES, DAMAGES[0]]


def test_equal_answers_are_not_measured_on():
    """No score tells which of two equal answers is preferred."""
    assert heldout_sample([Pair("a", "x", "x"), Pair("b", "x", "y")], 8)[0] == Pair("b", "x", "y")
    assert all(pair.chosen != pair.rejected for pair in heldout_sample([Pair("a", "x", "x"), Pair("b", "x", "y")], 8))


def test_a_model_without_padding_is_trained_as_it_is_scored(tiny_gold, tmp_path):
    """The score of each sequence is that of the sequence alone, whatever it is batched with."""
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    from parts.bradley_terry import BradleyTerryTrainer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_gold)
    model.config.pad_token_id = None
    sequences = [[5, 6, 7, 2], [5, 6], [0, 1, 2]]
    with torch.no_grad():
        alone = [model(torch.tensor([ids])).logits.item() for ids in sequences]
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = BradleyTerryTrainer(forward_tokens=64, model=model, args=arguments)
    inputs = {"sequences": sequences, "comparisons": {"preference": [(0, 1), (1, 2)]}}
    loss, scores = trainer.compute_loss(model, inputs, return_outputs=True)
    assert scores.tolist() == pytest.approx(alone, abs=1e-6) and model.config.pad_token_id is None
    expected = bradley_terry_loss(torch.tensor(alone)[[0, 1]], torch.tensor(alone)[[1, 2]])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_what_an_adapter_was_trained_on_is_not_held_out(tmp_path):
    settings = {"heldout_share": 0.15, "heldout_systems": ["one", "two"]}
    (tmp_path / "training_record.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    preferences = tmp_path / "pairs.jsonl"
    preferences.write_text("{}", encoding="utf-8")

    def now(**changes) -> train_gold_rm.GoldTrainingSettings:
        return train_gold_rm.GoldTrainingSettings(preferences=str(preferences), output_dir=str(tmp_path), **changes)

    train_gold_rm.require_unseen(now())
    train_gold_rm.require_unseen(now(heldout_share=0.1, heldout_systems=["two"]))
    with pytest.raises(InputError, match=r"--heldout_share is 0.9, expected 0.15 at most, with which .* was trained"):
        train_gold_rm.require_unseen(now(heldout_share=0.9))
    with pytest.raises(InputError, match=r"--heldout_systems holds 'gpt4', which .* did not hold out, expected some that it did"):
        train_gold_rm.require_unseen(now(heldout_systems=["two", "gpt4"]))
    record = {"settings": settings, "data": {"preferences": "of another file"}}
    (tmp_path / "training_record.json").write_text(json.dumps(record), encoding="utf-8")
    train_gold_rm.require_unseen(now(heldout_share=0.9, heldout_systems=["gpt4"]))
    # It went on from one that had learned from this file.
    record["start_from"] = {"settings": settings, "data": {"preferences": file_digest(preferences)}}
    (tmp_path / "training_record.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match=r"--heldout_share is 0.9, expected 0.15 at most"):
        train_gold_rm.require_unseen(now(heldout_share=0.9))
    (tmp_path / "training_record.json").unlink()
    train_gold_rm.require_unseen(now(heldout_share=0.9))


def test_accuracies_and_heldout_prompts():
    pairs = [Pair("a", "xxxx", "x", systems=("s", "t")), Pair("a", "x", "xxxx"), Pair("a", "xxxx", "xxxy"), Pair("a", "x", "y", "cut"),
             Pair("a", "xxxx", "xxxy", "similar length")]  # fmt: skip
    measured = accuracies(pairs, [1.0, -1.0, 0.5, 2.0, -1.0], ["t"])
    assert measured["all preferences"] == {"accuracy": 2 / 3, "longer_wins": 1 / 3, "n": 3}
    assert measured["of systems never trained on"] == {"accuracy": 1.0, "longer_wins": 1.0, "n": 1}
    assert measured["lengths within 25%"] == {"accuracy": 0.5, "longer_wins": 0.0, "n": 2}
    assert measured["shorter answer preferred"] == {"accuracy": 0.5, "longer_wins": 0.0, "n": 2}
    assert measured["both lengths alike"] == {"accuracy": 0.75, "longer_wins": 0.5, "n": 3}
    assert measured["against cut"] == {"accuracy": 1.0, "longer_wins": 0.0, "n": 1}
    assert sum(is_heldout(f"prompt {n}", 0.15) for n in range(2000)) == pytest.approx(300, abs=60)


def test_training_from_the_command_line(tiny_model, tmp_path):
    rows = [
        {
            "instruction": f"Say {n}.",
            "output_1": f"{n} it is, gladly.",
            "output_2": f"no {'no ' * (n % 7)}",
            "preference": 1 + n % 2,
            "generator_1": "one",
            "generator_2": f"system {n % 5}",
        }
        for n in range(60)
    ]
    preferences = tmp_path / "pairs.jsonl"
    preferences.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    output = tmp_path / "gold"
    done = run_script("train_gold_rm.py", "--preferences", preferences, "--model_name", tiny_model, "--output_dir", output, "--pairs", 16,
                      "--batch_size", 4, "--lora_layers", 1, "--bf16", "false", "--heldout_systems", "system 4",
                      "--epochs", 2, "--forward_tokens", 64)  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = read_json(output / "training_record.json")
    assert record["heldout"]["all preferences"]["n"] > 0
    assert record["seed"] == 42
    heldout = record["heldout"]["all preferences"]
    assert f"| all preferences | {heldout['accuracy']:.3f} | {heldout['longer_wins']:.3f} | {heldout['n']} |" in (
        output / "README.md"
    ).read_text(encoding="utf-8")
    scores = load_gold_reward_model(str(output), device="cpu").get_reward(BATCH)
    assert len(set(scores)) == len(ROWS)
    assert not output.with_name("gold.unfinished").exists()
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(read_json(output / "adapter_config.json")["target_modules"]) == linear

    # Again it is there; other settings, or another thing in its place, are in the way.
    words = ["train_gold_rm.py", "--preferences", preferences, "--model_name", tiny_model, "--output_dir", output, "--pairs", 16,
             "--batch_size", 4, "--lora_layers", 1, "--bf16", "false", "--heldout_systems", "system 4", "--epochs", 2]  # fmt: skip
    done = run_script(*words, "--forward_tokens", 64)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"{output}: is there already, made as it would be now"
    done = run_script(*words)
    told = f"error: {output}: exists already, made otherwise (--overwrite=true replaces it)"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, told)
    done = run_script(*words, "--output_dir", tiny_model)
    told = f"error: --output_dir: {tiny_model} is there and is no gold model, expected another place"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, told)

    again = tmp_path / "again"
    words = (
        "train_gold_rm.py",
        "--preferences",
        preferences,
        "--start_from",
        output,
        "--output_dir",
        again,
        "--pairs",
        4,
        "--learning_rate",
        1e-30,
    )
    refused = run_script(*words)
    assert refused.returncode == 2 and f"sits on {tiny_model}, expected models/SmolLM2-135M-Instruct" in refused.stderr
    refused = run_script(*words, "--model_name", tiny_model)
    assert refused.returncode == 2 and "was trained with heldout_systems ['system 4']" in refused.stderr
    done = run_script(*words, "--model_name", tiny_model, "--bf16", "false", "--heldout_systems", "system 4")
    assert done.returncode == 0, done.stderr
    assert load_gold_reward_model(str(again), device="cpu").get_reward(BATCH) == scores  # nothing was learned on top
    assert read_json(again / "training_record.json")["start_from"] == record


@pytest.mark.parametrize("bf16", [True, False])
def test_what_is_trained_is_fp32_whatever_the_model_is(tiny_model, tmp_path, bf16):
    """A head in bfloat16 would lose small steps; and without --bf16 nothing is in half precision."""
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    shutil.copy(tiny_model / "tokenizer.json", tmp_path / "half")
    shutil.copy(tiny_model / "tokenizer_config.json", tmp_path / "half")
    settings = train_gold_rm.GoldTrainingSettings(
        model_name=str(tmp_path / "half"), preferences="", output_dir="", lora_layers=1, bf16=bf16
    )
    model = train_gold_rm.reward_model(settings)
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in trained) and set(trained.values()) == {torch.float32}
    assert model.get_base_model().model.embed_tokens.weight.dtype == (torch.bfloat16 if bf16 else torch.float32)


def test_a_training_that_was_begun_otherwise_is_refused(tiny_model, tmp_path):
    from parts.runs import begin_training, resumable_training
    from train_gold_rm import GoldTrainingSettings, training_fingerprint

    rows = [{"instruction": f"Say {n}.", "output_1": f"{n} it is.", "output_2": "no", "preference": 1} for n in range(60)]
    preferences = tmp_path / "pairs.jsonl"
    preferences.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {"preferences": str(preferences), "model_name": str(tiny_model), "output_dir": str(tmp_path / "gold")}
    fingerprint = training_fingerprint(GoldTrainingSettings(**given))
    assert training_fingerprint(GoldTrainingSettings(**given, save_steps=7, data_note="mine")) == fingerprint
    assert training_fingerprint(GoldTrainingSettings(**given, learning_rate=1e-3)) != fingerprint

    unfinished = tmp_path / "gold.unfinished"
    begin_training(unfinished, fingerprint, None)
    for step, state in ((50, '{"global_step": 50}'), (100, '{"global_step": 100}'), (150, '{"global_'), (200, None)):  # kills left halves
        (unfinished / f"checkpoint-{step}").mkdir()
        if state:
            (unfinished / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert resumable_training(unfinished, fingerprint, overwrite=False) == unfinished / "checkpoint-100"
    words = ["train_gold_rm.py", *(f"--{name}={value}" for name, value in given.items())]
    refused = run_script(*words, "--learning_rate=1e-3")
    assert refused.returncode == 2
    told = f"error: {unfinished}: a training with other settings, rows or processes (--overwrite=true removes it)"
    assert refused.stderr.splitlines()[-1] == told
    assert resumable_training(unfinished, "other", overwrite=True) is None
    begin_training(unfinished, "other", None)
    assert [path.name for path in unfinished.iterdir()] == ["fingerprint"]


def test_a_model_without_a_chat_template_is_trained_with_one(tiny_model, tmp_path):
    """Of which the adapter's tokenizer knows, so that it scores as it was trained."""
    from transformers import AutoTokenizer

    plain = tmp_path / "plain"
    shutil.copytree(tiny_model, plain)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = None
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(plain)
    settings = train_gold_rm.GoldTrainingSettings(model_name=str(plain), preferences="", output_dir="", lora_layers=1)
    train_gold_rm.reward_model(settings).save_pretrained(tmp_path / "gold")
    train_gold_rm.load_framing_tokenizer(str(plain)).save_pretrained(tmp_path / "gold")
    gold = load_gold_reward_model(str(tmp_path / "gold"), device="cpu")
    text = gold.tokenizer.decode(gold.encode("Add 2.", "It is 4.")[0])
    assert text.endswith("completes the request.\n\n### Instruction:\nAdd 2.\n\n### Response:\nIt is 4.<|im_end|>")


def test_texts_beyond_the_models_reach_are_left_out_and_not_cut(tiny_model, tmp_path, capsys):
    """Also where the tokenizer would cut them; and what the model has no positions for is one line before it loads."""
    pairs = [train_gold_rm.Pair("Say it.", "word " * count, "no") for count in (2, 3, 90, 95)]
    settings = train_gold_rm.GoldTrainingSettings(
        preferences="p", model_name=str(tiny_model), balanced=False, damaged_texts=False, max_length=60, output_dir=str(tmp_path / "gold")
    )
    tokenizer = train_gold_rm.load_framing_tokenizer(str(tiny_model))
    tokenizer.model_max_length = 60
    rankings = train_gold_rm.training_rankings(settings, pairs, tokenizer)
    assert len(rankings) == 1 and "2 left out, longer than max_length" in capsys.readouterr().out
    assert len(rankings[0]["sequences"]) == 3  # the two short answers and the worse one
    short = shutil.copytree(tiny_model, tmp_path / "short")
    config = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10}), encoding="utf-8")
    (short / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"short: it has 10 positions, and the longest row has \d+ tokens: --max_length is 60, expected at most 10"
    ):
        train_gold_rm.train(dataclasses.replace(settings, model_name=str(short)), pairs, "", None)


def test_a_measurement_needs_no_pairs_to_train_on_and_lora_that_goes_on_no_rank():
    pairs = [train_gold_rm.Pair(f"Say {number}.", "yes", "no") for number in range(9)]
    settings = train_gold_rm.GoldTrainingSettings(preferences="p", heldout_share=1.0)
    with pytest.raises(InputError, match="no prompts left to train on"):
        train_gold_rm.split_pairs(settings, pairs)
    settings.evaluate_only = True
    assert train_gold_rm.split_pairs(settings, pairs) == ([], pairs)
    with pytest.raises(InputError, match="--lora_r with --start_from, whose LoRA goes on as it is"):
        train_gold_rm.GoldTrainingSettings(preferences="p", start_from="gold", lora_r=4)


def test_gold_training_is_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were launched, expected one"):
        train_gold_rm.GoldTrainingSettings(preferences="p.json")


def test_a_bad_preference_is_named(tmp_path):
    preferences = tmp_path / "pairs.jsonl"
    preferences.write_text('{"instruction": "a", "output_1": "b", "output_2": "c", "preference": 3}\n', encoding="utf-8")
    done = run_script("train_gold_rm.py", "--preferences", preferences)
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1]
        == f"error: {preferences}: row 1: field 'preference' is 3, expected 1 or 2, or a number between them"
    )
