"""Settings: YAML and command line by the same rules, unknown ones refused, none declared that nothing reads."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from dataclasses import dataclass

import pytest
from conftest import REPOSITORY

from parts.cli import Settings, parse_settings, setting
from parts.errors import InputError

SCRIPTS = {
    "run_ppo": "PPOSettings",
    "evaluation": "EvaluationSettings",
    "eval_monotonicity": "MonotonicitySettings",
    "train_gold_rm": "GoldTrainingSettings",
    "train_sft": "SFTSettings",
    "merge_adapter": "MergeSettings",
    "parts.bundled_models": "BundledModelSettings",
    "reward_model": "RewardSettings",
    "parts.score_files": "ScoreFileSettings",
    "parts.gold_settings": "GoldSettings",
}


@dataclass
class Example(Settings):
    rate: float = setting(1e-5, "a rate")
    steps: int = setting(10, "a count")
    active: bool = setting(True, "a switch")
    names: list[str] = setting(["a"], "some names")


def test_both_spellings_and_yaml_with_overrides(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("rate: 1e-4\nsteps: 3\nactive: false\nnames: [x, y]\n", encoding="utf-8")
    assert parse_settings(Example, []) == Example(1e-5, 10, True, ["a"])
    assert parse_settings(Example, ["--rate=2e-5", "--steps", "4", "--active=false"]) == Example(2e-5, 4, False, ["a"])
    assert parse_settings(Example, ["--config", str(config)]) == Example(1e-4, 3, False, ["x", "y"])
    assert parse_settings(Example, ["--steps", "9", f"--config={config}", "--active=true"]) == Example(1e-4, 9, True, ["x", "y"])


def test_yaml_means_what_the_same_words_mean(tmp_path):
    """A scalar is the text that is written, except null. A list ends before the files that follow."""

    @dataclass
    class Files(Settings):
        files: list[str] = setting([], "files", positional=True)
        name: str = setting("", "a name")
        names: list[str] = setting(["a"], "some names")
        steps: int = setting(10, "a count")
        active: bool = setting(False, "a switch")

    config = tmp_path / "c.yaml"
    config.write_text("name: 1.10\nsteps: 010\nactive: on\nnames: [x, 1_0]\n", encoding="utf-8")
    found = parse_settings(Files, ["a.json", "b.json", "--config", str(config)])
    assert (found.files, found.name, found.names, found.steps, found.active) == (["a.json", "b.json"], "1.10", ["x", "1_0"], 10, True)
    assert parse_settings(Files, ["--config", str(config), "a.json"]).files == ["a.json"]
    config.write_text("name: null\nsteps:\nactive: ~\n", encoding="utf-8")
    found = parse_settings(Files, ["a.json", f"--config={config}"])
    assert (found.name, found.steps, found.active) == ("", 10, False)


@pytest.mark.parametrize(
    ("yaml", "words", "message"),
    [
        ("speed: 3\n", [], "c.yaml: unknown setting 'speed'"),
        ("step: 3\n", [], "c.yaml: unknown setting 'step', did you mean steps?"),
        ("steps: 1\n", ["--nmes", "a"], "unrecognized arguments: --nmes a, did you mean --names?"),
        ("steps: 1\n", ["--active=maybe"], "argument --active: 'maybe', expected true or false"),
        ("rate: nan\n", [], "--rate is nan, expected a finite number"),
        ("steps: many\n", [], "argument --steps: invalid int value: 'many'"),
        ("- a\n", [], "c.yaml: expected a mapping of settings"),
        ("a: [\n", [], "c.yaml: broken YAML at line"),
        ("steps: 1\n", ["--speed=3"], "unrecognized arguments: --speed=3"),
        ("steps: 1\n", ["--step=3"], "unrecognized arguments: --step=3"),
    ],
)
def test_bad_settings(tmp_path, yaml, words, message):
    config = tmp_path / "c.yaml"
    config.write_text(yaml, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        parse_settings(Example, ["--config", str(config), *words])


def attributes_of(tree: ast.AST, variable: str) -> set[str]:
    """The names that are read as `variable.name` or as `something.variable.name`."""
    accesses = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in accesses if variable in (getattr(node.value, "id", None), getattr(node.value, "attr", None))}


def reads_of(module: str, variable: str) -> set[str]:
    return attributes_of(ast.parse((REPOSITORY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")), variable)


@pytest.mark.parametrize(("script", "cls"), SCRIPTS.items())
def test_every_declared_setting_is_read_and_explained(script, cls):
    fields = dataclasses.fields(getattr(importlib.import_module(script), cls))
    read = reads_of(script, "settings")
    if script in ("run_ppo", "parts.gold_settings"):  # which hand their settings on, or read their own
        read |= (
            reads_of("parts.ppo_checkpoints", "settings")
            | reads_of("parts.ppo_state", "settings")
            | reads_of("parts.ppo_setup", "settings")
            | reads_of("parts.gold_models", "self")
            | reads_of("parts.gold_settings", "self")
        )
    if script == "train_sft":
        read |= reads_of("parts.sft_data", "settings")
    if script == "eval_monotonicity":
        read |= reads_of(script, "self") | reads_of("parts.runs", "settings") | reads_of("parts.best_of_n_command", "settings")
    if script in ("run_ppo", "reward_model"):
        read |= reads_of("reward_model", "self") | reads_of("reward_model", "settings") | switches_in_use()
    unread = {field.name for field in fields} - read
    assert unread == set()
    assert all(field.metadata["help"] for field in fields)


def switches_in_use() -> set[str]:
    """The switches of the features: each is read by name, and turns its features on and off."""
    from reward_model import FEATURES, ProxySettings

    for feature in FEATURES:
        assert feature in ProxySettings(**{feature.switch: True}).on
        assert feature not in ProxySettings(**{feature.switch: False}).on
    return {feature.switch for feature in FEATURES}


@pytest.mark.parametrize("config", ["demo", "paper"])
def test_shipped_configurations_parse(config):
    from run_ppo import PPOSettings

    settings = parse_settings(PPOSettings, ["--config", str(REPOSITORY / "configs" / f"{config}.yaml"), "--model_name=m"])
    assert settings.reward_branching and settings.relevance_scaling
    if config == "paper":
        optimizer_steps = settings.ppo_epochs * settings.batch_size // (settings.mini_batch_size * settings.gradient_accumulation_steps)
        assert optimizer_steps == 32
        assert (settings.learning_rate, settings.lora_r, settings.output_max_length, settings.seed) == (1e-5, 8, 512, 42)


PUBLISHED = """exp_name model_name overall_steps seed save_freq output_dir cache_dir dataset_path dev_prompt_path logging_dir output_max_length
batch_size mini_batch_size gradient_accumulation_steps learning_rate lora_r lora_alpha lora_dropout reward_model_batch_size length_incentive
repetition_penalty relevance_scaling reward_branching chat_template_name rollout_postprocessing reward_baseline init_kl_coef target_kl
adap_kl_ctrl early_stopping ppo_epochs use_optimizer_setup warmup_ratio gradient_checkpointing tokenizer_name log_with reward_model_name"""


def test_published_flags_keep_their_names():
    from run_ppo import PPOSettings

    assert set(PUBLISHED.split()) <= {field.name for field in dataclasses.fields(PPOSettings)}


def test_positional_words_and_help(capsys):
    @dataclass
    class WithFiles:
        files: list[str] = setting([], "some files", positional=True)
        rate: float = setting(0.5, "a rate")
        active: bool = setting(True, "a switch")

    settings = parse_settings(WithFiles, ["a.json", "b.json", "--rate=0.25"])
    assert (settings.files, settings.rate) == (["a.json", "b.json"], 0.25)
    with pytest.raises(InputError, match="the following arguments are required: files"):
        parse_settings(WithFiles, ["--rate=1"])
    with pytest.raises(SystemExit):
        parse_settings(WithFiles, ["--help"])
    shown = capsys.readouterr().out
    assert "a rate (default: 0.5)" in shown and "--no_active" not in shown


def test_a_configuration_is_one_file_whose_keys_come_once(tmp_path):
    """A second file, or a second value, would take the first one's place without a word."""
    config = tmp_path / "c.yaml"
    config.write_text("rate: 1e-4\nsteps: 3\nrate: 2\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"c.yaml: broken YAML \('rate' comes twice, the second time at line 3\)"):
        parse_settings(Example, [f"--config={config}"])
    config.write_text("rate: 1e-4\n", encoding="utf-8")
    with pytest.raises(InputError, match="--config is given 2 times, expected one file"):
        parse_settings(Example, [f"--config={config}", "--config", str(config)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--warmup_ratio=0.1"], "--warmup_ratio is 0.1, which nothing reads without --use_optimizer_setup=true"),
        (["--target_kl=0.1"], "--target_kl is 0.1, which nothing reads without --early_stopping=true"),
        (["--adap_kl_ctrl=false", "--adap_kl_target=3"], "--adap_kl_target is 3.0, which nothing reads without --adap_kl_ctrl=true"),
        (["--vllm_gpu_memory_utilization=0.5"], "which nothing reads without --rollout_engine vllm"),
        (["--lora_dropout=1"], "--lora_dropout is 1.0, expected less than 1"),
        (["--lora_dropout=-3"], "--lora_dropout is -3.0, expected"),
    ],
)
def test_ppo_settings_that_nothing_reads_are_refused(words, message):
    from run_ppo import PPOSettings

    needed = ["--model_name=m", "--dataset_path=d.json", "--dev_prompt_path=e.json"]
    parse_settings(PPOSettings, needed)
    with pytest.raises(InputError, match=message):
        parse_settings(PPOSettings, [*needed, *words])
