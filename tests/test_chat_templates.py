"""Prompts as literal text, stop strings as literal text, and the way back to the raw instruction."""

from __future__ import annotations

import pytest

from parts.chat_templates import encode_answers, encode_prompts, load_template, template_names
from parts.errors import InputError

RENDERED = {
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay hi.\n\n### Response:",
    "llama-2": "[INST] Say hi. [/INST]",
    "mistral": "[INST] Say hi. [/INST]",
    "tulu": "<|user|>\nSay hi.\n<|assistant|>\n",
    "vicuna_v1.1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: Say hi. ASSISTANT:",
    "zephyr": "<|system|>\n</s>\n<|user|>\nSay hi.</s>\n<|assistant|>\n",
}


def test_every_template_file_is_tested():
    assert sorted([*RENDERED, "tokenizer"]) == sorted(template_names())


@pytest.mark.parametrize("name", RENDERED)
def test_rendering_and_back(name):
    template = load_template(name)
    assert template.render("Say hi.") == RENDERED[name]
    assert template.raw_instruction(RENDERED[name]) == "Say hi."
    assert template.raw_instruction("Say hi.") == "Say hi."
    assert (
        template.raw_instruction(template.render("Line one.\n\nUse {braces} and [INST] too")) == "Line one.\n\nUse {braces} and [INST] too"
    )


@pytest.mark.parametrize("name", RENDERED)
def test_stop_strings_are_literal_text(name):
    template = load_template(name)
    plain = "INST is a word. So is (this|that). User: hi. Tokens + more."
    assert template.strip_response(f"\n {plain} \n") == plain
    for stop in template.stop_strings:
        assert template.strip_response(f"{plain}{stop}and on") == plain


def test_further_turns_as_the_models_were_trained():
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go."}]
    rendered = {name: load_template(name).render_chat(turns, add_generation_prompt=True) for name in ("llama-2", "vicuna_v1.1")}
    assert rendered["llama-2"] == "[INST] Hi. [/INST] Yes? </s><s>[INST] Go. [/INST]"
    assert rendered["vicuna_v1.1"].endswith(" USER: Hi. ASSISTANT: Yes?</s>USER: Go. ASSISTANT:")


@pytest.mark.parametrize("name", RENDERED)
def test_stop_strings_of_every_template(name):
    strip = load_template(name).strip_response
    assert strip("a\n\n\n\nb") == "a"
    assert strip("a\n\n\nb") == "a\n\n\nb"
    assert strip("a\n\n--b") == "a"
    assert strip("a\n\n____") == "a"


def test_alpaca_stop_strings():
    assert load_template("alpaca").strip_response("### Response: b") == ""


def test_the_tokenizers_own_template(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    template = load_template("tokenizer", tokenizer)
    assert template.render("Say hi.") == "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    assert template.raw_instruction(template.render("Say hi.")) == "Say hi."
    assert template.stop_strings == ("<unk>", "<|im_end|>")
    assert template.strip_response("Hi!<|im_end|>\n<|im_start|>user") == "Hi!"


def test_answers_end_once_and_spell_no_control_token(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    template, end = load_template("tokenizer", tokenizer), tokenizer.eos_token_id
    plain, ended, spelled = encode_answers(tokenizer, template, ["Hi there.", "Hi there. <|im_end|>", "It is <|im_end|> here."])
    assert plain == ended == [*tokenizer("Hi there.")["input_ids"], end]
    assert spelled[-1] == end and end not in spelled[:-1] and tokenizer.decode(spelled[:-1]) == "It is <|im_end|> here."


def test_no_second_bos(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model, bos_token="<|im_start|>")
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    (ids,) = encode_prompts(tokenizer, ["<|im_start|>user\nhi"])
    assert ids.count(bos) == 1


def test_unknown_names_are_one_line():
    with pytest.raises(InputError, match="unknown chat template 'alpacca', expected one of alpaca, llama-2"):
        load_template("alpacca")
    with pytest.raises(InputError, match="no chat template of its own"):
        load_template("tokenizer")


def test_a_template_file_without_stop_strings_is_named(tmp_path, monkeypatch):
    (tmp_path / "mine.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}", encoding="utf-8")
    monkeypatch.setattr("parts.chat_templates.FOLDER", tmp_path)
    with pytest.raises(InputError, match="mine.jinja: expected `set stop_strings"):
        load_template("mine")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for message in messages %}", "mine.jinja: the template fails .TemplateSyntaxError"),
        ("{{ messages[0].nothing.more }}", "mine.jinja: the template fails .UndefinedError"),
        ("Hello", "mine.jinja: a prompt holds the instruction 0 times, expected once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "a prompt holds the instruction 2 times"),
    ],
)
def test_a_template_that_cannot_render_is_named(tmp_path, monkeypatch, source, message):
    (tmp_path / "mine.jinja").write_text(source, encoding="utf-8")
    monkeypatch.setattr("parts.chat_templates.FOLDER", tmp_path)
    with pytest.raises(InputError, match=message):
        load_template("mine")


def test_of_several_named_templates_the_default_counts(tiny_model):
    from parts.models import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    own = load_template("tokenizer", tokenizer)
    tokenizer.chat_template = {"tool_use": "{{ messages }}", "default": own.source}
    assert load_template("tokenizer", tokenizer) == own
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    with pytest.raises(InputError, match="has no chat template of its own, but others called tool_use, rag"):
        load_template("tokenizer", tokenizer)


def test_a_row_that_a_template_refuses_is_named(tiny_model):
    """Gemma's template, for one, takes no system turn."""
    from parts.chat_templates import ChatTemplate, encode_rows
    from parts.models import load_tokenizer

    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    template = ChatTemplate("tokenizer", source, ("</s>",), ("<s>",))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    rows = [{"input": "Hi."}, {"input": "Hi.", "messages": turns}]
    with pytest.raises(InputError, match="chat.json: row 2: chat template 'tokenizer': it cannot be rendered .*no system role"):
        encode_rows(load_tokenizer(str(tiny_model)), template, rows, "input", "chat.json")
