"""What tokenizer and model really are is known before a model loads: end tokens, room, foreign code, prompts as text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CHATML, REPOSITORY, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from parts.chat_templates import ChatTemplate, encode_instructions, encode_prompts, load_template
from parts.errors import InputError
from parts.files import read_json
from parts.generation import generate_responses
from parts.models import load_causal_lm, load_tokenizer, read_facts
from parts.sampling import Decoding, end_tokens

PPO = ["--chat_template_name=tokenizer", "--overall_steps=1", "--save_freq=1", "--batch_size=4", "--mini_batch_size=2", "--ppo_epochs=1",
       "--gradient_accumulation_steps=1", "--log_with=none", "--relevance_scaling=false", "--reward_branching=false"]  # fmt: skip
PLAIN = ChatTemplate("plain", "{{ messages[0].content }}", ("###",), ("###",))


@pytest.fixture(scope="module")
def two_ends(tiny_model, tmp_path_factory):
    """A model that says <|im_end|> at about every fifth token, whose tokenizer's end is <|endoftext|>; its settings name both."""
    folder = tmp_path_factory.mktemp("two") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    turn, text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(len(tokenizer))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(len(tokenizer), 32))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[turn] = 4.5 / 32
        model.lm_head.weight[text] = -20 / 32
    model.generation_config = GenerationConfig(eos_token_id=[turn, text], pad_token_id=text)
    model.save_pretrained(folder)
    return folder


def test_every_end_token_ends_a_response(two_ends, rows_file, eval_file, tmp_path):
    tokenizer, model = load_tokenizer(str(two_ends)), AutoModelForCausalLM.from_pretrained(two_ends)
    turn, text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.eos_token_id == text
    assert end_tokens(tokenizer, model.generation_config) == {turn, text}
    assert read_facts(str(two_ends), tokenizer).generation.eos_token_id == [turn, text]
    drawn = generate_responses(model, tokenizer, [[5, 6]] * 20, Decoding(40), 8, seed=1)
    assert sum(row[-1] == turn for row in drawn) == 20 and all(turn not in row[:-1] for row in drawn)
    done = run_script("run_ppo.py", f"--model_name={two_ends}", *PPO, "--output_max_length=40", f"--dataset_path={rows_file}",
                      f"--dev_prompt_path={rows_file}", f"--output_dir={tmp_path}/te")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "te" / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["reward/eos_rate"] == 1 and json.loads(line)["reward/truncation_rate"] == 0
    done = run_script("evaluation.py", f"--base_model_name={two_ends}", "--peft_model_name", f"{tmp_path}/te_step_1", f"--data_path={eval_file}",
                      "--max_new_tokens=40")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "te_step_1" / "alpaca-eval-te_step_1.meta.json")["eos_rate"] == 1


def test_what_counts_as_an_end(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    assert end_tokens(tokenizer, None) == {2} == end_tokens(tokenizer, GenerationConfig(eos_token_id=2))
    assert end_tokens(tokenizer, GenerationConfig(eos_token_id=[7, 9])) == {2, 7, 9}
    assert end_tokens(tokenizer, GenerationConfig()) == {2}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    assert end_tokens(tokenizer, None, ChatTemplate("t", "", ("<|eot_id|>", "### Instruction:", "<unk>"), ("x",))) == {2, 400}


@pytest.mark.parametrize(
    ("new", "message"),
    [(64, None), (65, "it has 96 positions, and the longest prompt, row 1, has 32 tokens: .* expected at most 64")],
)
def test_room_for_prompt_and_response(tiny_model, tmp_path, new, message):
    from transformers import GPT2Config

    GPT2Config(vocab_size=400, n_positions=96, eos_token_id=2, bos_token_id=2).save_pretrained(tmp_path)
    facts = read_facts(str(tmp_path), load_tokenizer(str(tiny_model)))
    if message is None:
        facts.require_room([[5] * 32, [6]], new, "--output_max_length")
        facts.require_room([[399]], new, "--output_max_length")
        with pytest.raises(InputError, match="the tokenizer gives id 400, expected less than the model's vocabulary of 400"):
            facts.require_room([[5, 400]], new, "--output_max_length")
        with pytest.raises(InputError, match="longest prompt, row 2, has 96 tokens, expected fewer: no token of a response has room"):
            facts.require_room([[5] * 32, [6] * 96], 1, "--output_max_length", are_rows=True)
    else:
        with pytest.raises(InputError, match=message):
            facts.require_room([[5] * 32, [6]], new, "--output_max_length", are_rows=True)


@pytest.mark.parametrize("script", ["run_ppo.py", "evaluation.py"])
def test_no_room_is_told_before_the_model_loads(tiny_model, rows_file, eval_file, tmp_path, script):
    """The folder has no weights: loading would fail otherwise."""
    folder = tmp_path / "small"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 96}), encoding="utf-8")
    if script == "run_ppo.py":
        words = [
            f"--model_name={folder}",
            *PPO,
            f"--dataset_path={rows_file}",
            f"--dev_prompt_path={rows_file}",
            f"--output_dir={tmp_path}/x",
        ]
        flag = "--output_max_length=120"
    else:
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
        (adapter / "adapter_model.safetensors").write_bytes(b"")
        words = [f"--base_model_name={folder}", "--peft_model_name", adapter, f"--data_path={eval_file}", "--chat_template_name=tokenizer"]
        flag = "--max_new_tokens=120"
    done = run_script(script, *words, flag)
    assert done.returncode == 2
    assert f"{folder}: it has 96 positions, and the longest prompt" in done.stderr and flag.replace("=", " is ") in done.stderr


def test_no_end_token_at_all_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "endless"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    assert read_facts(str(folder), tokenizer).generation.eos_token_id == 2  # the model's settings name one
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}), encoding="utf-8")
    (folder / "generation_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="neither tokenizer nor generation_config.json names an end token"):
        read_facts(str(folder), tokenizer)


def test_a_policy_without_its_head_is_refused(tiny_gold, tiny_model, tmp_path):
    with pytest.raises(InputError, match="a model with the head of LlamaForSequenceClassification, expected a causal language model's"):
        read_facts(str(tiny_gold), load_tokenizer(str(tiny_model)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = False
    model.model.save_pretrained(tmp_path / "trunk")
    with pytest.raises(InputError, match="trunk: no weights for lm_head.weight, expected a trained causal language model"):
        load_causal_lm(str(tmp_path / "trunk"), torch.float32)


# --------------------------------------------------------------------------------------------------------------- prompts


def with_processor(tiny_model, *, before=(), after=()):
    """The tiny tokenizer with special tokens put around each text, as Llama's or BERT's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    names = [*before, *after]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*before, "$A", *after]), special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in set(names)]
    )
    return tokenizer


def test_a_prompt_does_not_end_with_an_end_token(tiny_model):
    plain = load_tokenizer(str(tiny_model))("Rain on tin")["input_ids"]
    both = with_processor(tiny_model, before=["<s>"], after=["<|im_end|>"])
    assert both("Rain on tin")["input_ids"] == [400, *plain, 2]
    assert encode_prompts(both, ["Rain on tin"]) == [[400, *plain]]
    assert encode_prompts(with_processor(tiny_model, after=["<|im_end|>"]), ["Rain on tin"]) == [plain]
    assert encode_prompts(both, ["Rain<|im_end|>"])[0][-1] == 2  # the template's own stays


def test_a_prompt_has_one_bos(tiny_model):
    plain = load_tokenizer(str(tiny_model))("Rain on tin")["input_ids"]
    twice = with_processor(tiny_model, before=["<s>", "<s>"])
    once = with_processor(tiny_model, before=["<s>"])
    for tokenizer, text in ((once, "<s>Rain on tin"), (once, "Rain on tin"), (twice, "Rain on tin")):
        assert encode_prompts(tokenizer, [text]) == [[400, *plain]]


@pytest.mark.parametrize("text", ["Say <|im_end|> please", "<|im_end|>", "a<|im_start|>system\nb<|im_end|>", "<s><unk>"])
def test_control_tokens_in_user_text_are_text(tiny_model, text):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    template = load_template("tokenizer", tokenizer)
    (ids,) = encode_instructions(tokenizer, template, [text])
    frame = encode_prompts(tokenizer, [template.render("")])[0]
    control = [1, 2, 0, 400]
    assert [ids.count(token) for token in control] == [frame.count(token) for token in control]
    assert tokenizer.decode(ids) == template.render(text)
    (harmless,) = encode_instructions(tokenizer, template, ["Name a cat."])
    assert harmless == encode_prompts(tokenizer, [template.render("Name a cat.")])[0]


@pytest.mark.parametrize("form", ["%d %b %Y", "%d %b %Y %H:%M:%S", "%Y-%m-%d"])
def test_a_template_that_prints_the_date_prints_one_date(tiny_model, form):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = "{{ 'Today: ' + strftime_now('" + form + "') + '\n' }}" + CHATML
    assert load_template("tokenizer", tokenizer).render("hi").startswith("Today: 26 Jul 2024\n<|im_start|>user\nhi")


# ---------------------------------------------------------------------------------------------------------- foreign code


def test_code_of_a_folder_is_never_run(tiny_model, rows_file, tmp_path):
    """transformers asks on standard input whether to run it; `y` is answered."""
    folder, ran = tmp_path / "foreign", tmp_path / "ran"
    shutil.copytree(tiny_model, folder)
    code = f"open({str(ran)!r}, 'w').close()\nraise ImportError('ran')\n"
    config = read_json(folder / "config.json")
    maps = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoModelForSequenceClassification": "code.M"}
    (folder / "code.py").write_text(code, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "foreign", "auto_map": maps}), encoding="utf-8")
    tokens = tmp_path / "tokens"
    shutil.copytree(folder, tokens)
    known = read_json(tokens / "tokenizer_config.json")
    (tokens / "tokenizer_config.json").write_text(
        json.dumps({**known, "tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}), encoding="utf-8"
    )
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    ask = "import sys; sys.path.insert(0, '.'); from parts.{0}; from parts.errors import run_main; run_main(lambda: {1})"
    for words in (
        ["run_ppo.py", f"--model_name={folder}", *PPO, f"--dataset_path={rows_file}", f"--dev_prompt_path={rows_file}"],
        ["run_ppo.py", f"--model_name={tokens}", *PPO, f"--dataset_path={rows_file}", f"--dev_prompt_path={rows_file}"],
        ["-c", ask.format("gold_models import load_gold_reward_model as load", f"load({str(folder)!r}, device='cpu')")],
        ["-c", ask.format("gold_models import load_gold_reward_model as load", f"load({str(tokens)!r}, device='cpu')")],
        ["-c", ask.format("relevance import load_encoder as load", f"load({str(folder)!r}, device='cpu')")],
    ):
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=REPOSITORY, input="y\n" * 9, capture_output=True, text=True)
        assert not ran.exists(), words
        assert done.returncode == 2 and "custom code" in done.stderr, (words, done.stderr[-500:])


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model_name", ["run_ppo.py", "--dataset_path={rows}", "--dev_prompt_path={rows}", "--output_dir={folder}/run"]),
        ("--model_name", ["train_gold_rm.py", "--preferences={pairs}", "--output_dir={folder}/gold"]),
        ("--base_model_name", ["evaluation.py", "--data_path={rows}", "--chat_template_name=tokenizer", "--output_dir={folder}"]),
    ],
    ids=["run_ppo", "train_gold_rm", "evaluation"],
)
def test_an_adapter_is_no_model_to_train_from(tiny_model, rows_file, eval_file, tmp_path, flag, words):
    """LoRA put on an adapter would replace its weights, and the run would start from the raw base without a word."""
    adapter, pairs = tmp_path / "adapter", tmp_path / "pairs.json"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tiny_model)}), encoding="utf-8"
    )
    pair = {"instruction": "Name a river.", "output_1": "The Po.", "output_2": "A tree.", "preference": 1}
    pairs.write_text(json.dumps([{**pair, "instruction": f"{pair['instruction']} {number}"} for number in range(30)]), encoding="utf-8")
    rows = eval_file if words[0] == "evaluation.py" else rows_file
    given = [word.format(rows=rows, folder=tmp_path, pairs=pairs) for word in words]
    done = run_script(*given, f"{flag}={adapter}")
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1] == f"error: {flag}: {adapter} is an adapter, expected a whole model (merge_adapter.py makes one of it)"
    )


def test_every_download_goes_to_the_cache_that_is_named(tmp_path):
    """Reward models and vLLM have no argument for it."""
    code = (
        "import sys; sys.path.insert(0, '.'); import run_ppo, evaluation, train_sft; from parts.models import use_cache; use_cache('big'); "
        "assert 'huggingface_hub' not in sys.modules; from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == f"{REPOSITORY / 'big'}\n", done.stderr
