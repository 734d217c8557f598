"""Every kind of adapter beside PEFT alone: itself, a second of its kind, and the plain LoRA after them on the same base."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from conftest import run_script
from transformers import AutoConfig, AutoModelForCausalLM

from parts.adapters import KINDS, check_adapter, check_pattern, gives_base_back, put_on
from parts.errors import InputError
from parts.files import read_json
from parts.generation import HFEngine
from parts.models import load_tokenizer
from parts.ppo_setup import lora_targets
from parts.sampling import Decoding

TARGETS = ["q_proj", "v_proj"]
PROMPTS = [[5, 6, 7], [9, 10], [20, 21, 22, 23, 24], [30], [40, 41, 42]]


def lora(**more):
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": TARGETS, **more})


def other(name: str, **more):
    return getattr(peft, f"{name}Config")(**{"task_type": "CAUSAL_LM", "target_modules": TARGETS, **more})


ADAPTERS = {
    "LORA": lora,
    "rank-stabilised": lambda: lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 16}),
    "dora": lambda: lora(use_dora=True),
    "bias of B": lambda: lora(lora_bias=True),
    "biases": lambda: lora(bias="all"),
    "norms": lambda: lora(modules_to_save=["input_layernorm", "norm"]),
    "head": lambda: lora(modules_to_save=["lm_head"]),
    "embedding": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "all linear": lambda: lora(target_modules="all-linear"),
    "tokens": lambda: lora(trainable_token_indices=[5, 9, 40]),
    "parameters": lambda: lora(target_parameters=["mlp.up_proj.weight"]),
    "layers twice": lambda: lora(layer_replication=[[0, 2], [1, 2]]),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "ADALORA": lambda: other("AdaLora", total_step=10, init_r=4),
    "IA3": lambda: other("IA3", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LOHA": lambda: other("LoHa", r=4),
    "LOKR": lambda: other("LoKr", r=4),
    "OFT": lambda: other("OFT", r=0, oft_block_size=8),
    "BOFT": lambda: other("BOFT", boft_block_size=4),
    "LN_TUNING": lambda: other("LNTuning", target_modules=["input_layernorm"]),
    "VERA": lambda: other("Vera", target_modules=["q_proj"], r=4),
    "FOURIERFT": lambda: other("FourierFT", n_frequency=20),
    "HRA": lambda: other("HRA", r=4),
    "RANDLORA": lambda: other("RandLora", target_modules=["q_proj"], r=4),
    "ROAD": lambda: other("Road", group_size=8),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[5, 9, 40], target_modules=["embed_tokens"]),
    "SHIRA": lambda: other("Shira", r=4),
    "C3A": lambda: other("C3A", block_size=8),
    "WAVEFT": lambda: other("WaveFT", n_frequency=20),
    "DELORA": lambda: other("Delora", r=4),
    "GRALORA": lambda: other("Gralora", r=4, gralora_k=2),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    """The tiny model with an output head of its own, and weights so large that its samples turn on each of them."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=False))
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return folder


def save(base, folder, config, seed: int):
    torch.manual_seed(seed)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) * 0.3
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def alone(base, folder) -> list[list[int]]:
    """Greedy tokens by PEFT and transformers, one row at a time, on a base of its own."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    rows = []
    for prompt in PROMPTS:
        new = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=2)[0]
        rows.append(new[len(prompt) :].tolist())
    return rows


@pytest.fixture(scope="module")
def engine(base):
    return HFEngine(str(base), load_tokenizer(str(base)), "cpu", batch_size=3)


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """A plain LoRA, and what it gives alone."""
    folder = save(base, tmp_path_factory.mktemp("plain") / "adapter", lora(), 7)
    return folder, alone(base, folder)


def drawn(engine, folder) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    engine.generate(str(folder), PROMPTS, Decoding(8, temperature=0), 0, range(len(PROMPTS)), found.__setitem__)
    return [found[place] for place in range(len(PROMPTS))]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_acts_in_full_and_leaves_the_base_as_it_was(base, engine, plain, tmp_path, name):
    folders = [save(base, tmp_path / f"adapter_{seed}", ADAPTERS[name](), seed) for seed in (1, 2)]
    expected = [alone(base, folder) for folder in folders]
    bare = AutoModelForCausalLM.from_pretrained(base).generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    assert expected[0] != expected[1] and [row[3:].tolist() for row in bare] != expected[0][:1]  # these adapters do something
    for folder in folders:
        check_adapter(folder)
    assert [drawn(engine, folder) for folder in folders] == expected
    assert drawn(engine, plain[0]) == plain[1]


def test_every_kind_that_is_taken_is_tried():
    assert set(KINDS) == {ADAPTERS[name]().peft_type.value for name in ADAPTERS}


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
        lambda: other("VBLoRA", target_modules=["q_proj"], vector_length=8, num_vectors=8, r=4),
        lambda: other("Miss", r=4),
        lambda: peft.PolyConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=2),
        lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1, target_modules="self_attn"),
    ],
    ids=["prompt", "prefix", "p-tuning", "vector bank", "miss", "poly", "adaption"],
)
def test_adapters_that_are_more_than_weights_are_refused(base, tmp_path, config):
    folder = save(base, tmp_path / "adapter", config(), 1)
    with pytest.raises(InputError, match=r"adapter_config.json: peft_type is [A-Z_]+, expected one of LORA, "):
        check_adapter(folder)


def test_other_adapters_that_are_refused(base, tmp_path):
    folder = save(base, tmp_path / "adapter", lora(alora_invocation_tokens=[5, 6]), 1)
    with pytest.raises(InputError, match="acts from its alora_invocation_tokens on"):
        check_adapter(folder)
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="task_type is 'SEQ_CLS', expected CAUSAL_LM"):
        check_adapter(folder)
    for config in ({}, {"peft_type": None}, {"peft_type": ["LORA"]}):
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(InputError, match="no peft_type, expected the configuration of a PEFT adapter"):
            check_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "NEWEST"}), encoding="utf-8")
    with pytest.raises(InputError, match="peft_type is NEWEST"):
        check_adapter(folder)
    with pytest.raises(InputError, match="more than LoRA's two matrices of one rank and scale, which is all that --engine vllm takes"):
        check_adapter(save(base, tmp_path / "dora", lora(use_dora=True), 1), plain=True)
    check_adapter(save(base, tmp_path / "lora", lora(), 1), plain=True)
    # vLLM knows one rank and one scale of all modules.
    for name, more in (("ranks", {"rank_pattern": {"q_proj": 4}}), ("scales", {"alpha_pattern": {"q_proj": 4}})):
        folder = save(base, tmp_path / name, lora(**more), 1)
        check_adapter(folder)
        with pytest.raises(InputError, match="more than LoRA's two matrices of one rank and scale"):
            check_adapter(folder, plain=True)
    config = read_json(tmp_path / "lora" / "adapter_config.json")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**config, "r": 1024}), encoding="utf-8")
    with pytest.raises(InputError, match="its rank is 1024, expected 512 at most with --engine vllm"):
        check_adapter(tmp_path / "lora", plain=True)
    assert not gives_base_back(tmp_path / "dora") and gives_base_back(tmp_path / "lora")


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (("model.layers", "transformer.h"), "weights for modules that this model lacks"),
        (("layers.1.", "layers.7."), "weights for modules that this model lacks"),
        (("layers.1.", None), "no weights for modules that it names"),
    ],
    ids=["another class", "more layers", "fewer layers"],
)
def test_weights_that_match_nothing_are_refused(base, plain, tmp_path, rename, message):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "adapter"
    shutil.copytree(plain[0], folder)
    weights = load_file(folder / "adapter_model.safetensors")
    old, new = rename
    weights = {name.replace(old, new) if new else name: weight for name, weight in weights.items() if new or old not in name}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{folder}: cannot be loaded as an adapter of {base} .{message}"):
        put_on(AutoModelForCausalLM.from_pretrained(base), folder, str(base))


def test_an_adapter_without_a_record_needs_its_template_said(base, plain, eval_file):
    words = ["evaluation.py", f"--base_model_name={base}", "--peft_model_name", plain[0], f"--data_path={eval_file}", "--max_new_tokens=4"]
    done = run_script(*words)
    assert done.returncode == 2 and f"{plain[0]}: no record of a training run, expected --chat_template_name" in done.stderr
    done = run_script(*words, "--chat_template_name=tokenizer")
    assert done.returncode == 0, done.stderr


def test_patterns_of_modules():
    check_pattern([r".*layers\.0\..*(q|v)_proj"])
    check_pattern(["q_proj", "v_proj"])
    with pytest.raises(InputError, match=r"--lora_target_modules is '\*_proj', expected a regular expression \(nothing to repeat"):
        check_pattern(["*_proj"])


def test_lora_target_modules(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    assert lora_targets(model, ["all-linear"]) == "all-linear"
    assert lora_targets(model, [r".*layers\.0\..*(q|v)_proj"]) == r".*layers\.0\..*(q|v)_proj"
    assert lora_targets(model, ["q_proj", "mlp.down_proj"]) == ["q_proj", "mlp.down_proj"]
    for names in (["q_proj", "v_porj"], ["v_porj"], ["q_proj", "all-linear"]):
        with pytest.raises(
            InputError, match="--lora_target_modules holds '(v_porj|all-linear)', expected modules of the model: down_proj, "
        ):
            lora_targets(model, names)
