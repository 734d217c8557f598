"""Passes of fixed shapes, kernel by kernel on a CPU: what a graph repeats on a GPU (tests/test_gpu.py)."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from parts import cuda_graphs
from parts.kv_batches import Batch
from parts.sampling import Decoding, check_sampling, row_draws, sample


@pytest.fixture
def policy(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture
def told(monkeypatch):
    """What was said."""
    lines: list[str] = []
    monkeypatch.setattr(cuda_graphs, "say_once", lines.append)
    return lines


def passes_read(model) -> list[tuple[int, int, bool]]:
    """Rows and tokens of each pass from now on, and whether its mask was a fixed one."""
    seen: list[tuple[int, int, bool]] = []

    def note(module, args, given):
        seen.append((*given["input_ids"].shape, given.get("attention_mask", given["input_ids"]).ndim == 4))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_responses_are_those_of_each_prompt_alone(policy, fixed_passes, told):
    """Rows end, others take their places, and the room for tokens runs out several times."""
    prompts = [[20 + number] * (2 + number % 6) for number in range(12)]
    draws = row_draws(7, range(12), 24)
    cuda_graphs.DEVICES = ()
    alone = [sample(policy, [prompt], Decoding(24), draws[row : row + 1], ends=())[0] for row, prompt in enumerate(prompts)]
    cuda_graphs.DEVICES = ("cpu",)
    ends = {alone[3][5], alone[8][2], alone[0][7]}
    expected = [response[: next((place + 1 for place, token in enumerate(response) if token in ends), 24)] for response in alone]
    for at_a_time in (0, 1, 3, 8):
        seen = passes_read(policy)
        assert sample(policy, prompts, Decoding(24), draws, ends, at_a_time) == expected
        assert {fixed == (tokens == 1) for _, tokens, fixed in seen} == {True}
    assert not told


def test_rows_leave_when_half_of_them_have_ended(policy, fixed_passes):
    """Each time costs a capture, where it costs the moving of keys and values otherwise."""
    prompts, draws = [[5, 6, number] for number in range(20, 36)], row_draws(7, range(16), 24)
    alone = [sample(policy, [prompt], Decoding(24), draws[row : row + 1], ends=())[0] for row, prompt in enumerate(prompts)]
    ends = {response[4 + row % 9] for row, response in enumerate(alone)}
    seen = passes_read(policy)
    found = sample(policy, prompts, Decoding(24), draws, ends)
    lengths = [next((place + 1 for place, token in enumerate(response) if token in ends), 24) for response in alone]
    assert found == [response[:length] for response, length in zip(alone, lengths)] and len(set(lengths)) > 4
    sizes = [rows for rows, tokens, _ in seen if tokens == 1]
    assert (
        len(set(sizes)) > 2
        and min(sizes) <= 2
        and all(later <= earlier / 2 for earlier, later in zip(sizes, sizes[1:]) if later != earlier)
    )


def test_few_rows_stay_together(policy, fixed_passes, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "FEW_ROWS", 16)
    prompts, draws = [[5, 6, number] for number in range(20, 36)], row_draws(7, range(16), 24)
    plain = sample(policy, prompts, Decoding(24), draws, ends=())
    ends, seen = {response[4 + row % 9] for row, response in enumerate(plain)}, passes_read(policy)
    assert len(set(map(len, sample(policy, prompts, Decoding(24), draws, ends)))) > 2
    assert {rows for rows, tokens, _ in seen if tokens == 1} == {16}


def test_a_graph_is_captured_once_for_each_room(policy, fixed_passes, monkeypatch):
    captured = []
    monkeypatch.setattr(cuda_graphs, "capture", lambda step, device: captured.append(step) or step)
    sample(policy, [[5, 6, 7, 8]] * 2, Decoding(15), row_draws(0, range(2), 15), ends=())
    assert len(captured) == 4  # of 14 passes four have room each time, and the first of them is none


def test_no_row_grows_beyond_the_models_positions(fixed_passes):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=12, n_embd=8, n_layer=1, n_head=2)).eval()
    prompts, draws = [[3, 4, 5, 6]] + [[7]] * 30, row_draws(7, range(31), 8)
    alone = [sample(model, [prompt], Decoding(8), draws[row : row + 1], ends=())[0] for row, prompt in enumerate(prompts)]
    ends = {alone[1][0]}
    expected = [response[: response.index(alone[1][0]) + 1] if alone[1][0] in response else response for response in alone]
    assert sample(model, prompts, Decoding(8), draws, ends, at_a_time=16) == expected


def test_a_pass_that_cannot_be_captured_is_read_kernel_by_kernel(policy, fixed_passes, monkeypatch, told):
    """Said once; the token that it stopped at is read too."""
    prompts, draws = [[5, 6, 7], [8, 9]], row_draws(3, range(2), 12)
    expected = sample(policy, prompts, Decoding(12), draws, ends=())

    def fail(step, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(cuda_graphs, "capture", fail)
    seen = passes_read(policy)
    assert sample(policy, prompts, Decoding(12), draws, ends=()) == expected
    assert [fixed for *_, fixed in seen] == [False, True] + [False] * 10
    assert sample(policy, prompts, Decoding(12), draws, ends=()) == expected and not any(fixed for *_, fixed in seen[12:])
    assert told == [f"{policy.config.name_or_path}: tokens are sampled without CUDA graphs, more slowly "
                    "(operation not permitted when stream is capturing)"]  # fmt: skip


def test_a_model_that_asks_for_what_a_graph_would_repeat_is_read_kernel_by_kernel(policy, fixed_passes, told):
    prompts, draws = [[5, 6, 7], [8, 9]], row_draws(3, range(2), 12)
    expected = sample(policy, prompts, Decoding(12), draws, ends=())

    def ask(module, args, given):
        given["past_key_values"].get_seq_length()

    policy.model.register_forward_pre_hook(ask, with_kwargs=True)
    assert sample(policy, prompts, Decoding(12), draws, ends=()) == expected
    assert len(told) == 1 and "it asks how many tokens were read" in told[0]


def test_memory_that_runs_out_is_an_error(policy, fixed_passes, monkeypatch, told):
    def fail(step, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_graphs, "capture", fail)
    with pytest.raises(torch.OutOfMemoryError):
        sample(policy, [[5, 6, 7]], Decoding(12), row_draws(3, [0], 12), ends=())
    assert not told


def test_the_check_meets_fixed_passes(policy, fixed_passes):
    """More than one repeats, after rows have left and others have entered."""
    seen = passes_read(policy)
    check_sampling(policy)
    assert sum(fixed for *_, fixed in seen) >= 4


def test_nothing_of_a_batch_outlives_its_responses(policy, fixed_passes, monkeypatch):
    """Its keys and values would stay on the GPU beside the training that follows, until Python looks for circles."""
    alive: list[weakref.ref] = []

    def note(batch, *given):
        alive.append(weakref.ref(batch))
        own(batch, *given)

    own = Batch.__init__
    monkeypatch.setattr(Batch, "__init__", note)
    monkeypatch.setattr(
        cuda_graphs, "capture", lambda step, device: (lambda found: lambda: found)(step())
    )  # as a graph, which keeps no step
    gc.disable()
    try:
        sample(policy, [[5, 6, 7]] * 3, Decoding(12), row_draws(3, range(3), 12), ends=())
        assert alive and not any(batch() for batch in alive)
    finally:
        gc.enable()


def test_nothing_is_fixed_on_a_cpu(policy):
    batch = Batch(policy, [[5, 6, 7], [8, 9]])
    batch.read(torch.tensor([3, 4]))
    assert batch.mask.ndim == 2 and batch._fixed is None
