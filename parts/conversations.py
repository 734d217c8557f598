"""A question and its answer as a gold reward model reads them: token ids by the model's own chat template, or a pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parts.chat_templates import TOKENIZER_OWN, ChatTemplate, own_source
from parts.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_conversation(tokenizer: PreTrainedTokenizerBase, query: str, response: str, max_length: int) -> list[int]:
    """Token ids of one user turn and one assistant turn in the tokenizer's own chat template.

    A tokenizer without a chat template (cross-encoder reward models) encodes the two texts as a pair. Ids beyond `max_length` are cut on the
    left, after a first BOS or CLS. A template that fails without a system turn gets an empty one.

    Raises:
        InputError: several chat templates without a default, or neither one nor a token that ends a pair: where the question ends, and the answer, could not be told.
    """
    return encode_row(tokenizer, query, response, max_length)[0]


def encode_row(tokenizer: PreTrainedTokenizerBase, query: str, response: str, max_length: int) -> tuple[list[int], list[int]]:
    """As `encode_conversation`, with the token types of a pair; other ids have the type 0."""
    if not tokenizer.chat_template:
        tokenizer.truncation_side = "left"
        found = tokenizer(query, response, truncation="longest_first", max_length=max_length)
        if found["input_ids"][-1] not in tokenizer.all_special_ids:
            raise InputError(f"{tokenizer.name_or_path}: its tokenizer has no chat template, and nothing that ends a pair of texts")
        return found["input_ids"], found.get("token_type_ids", [0] * len(found["input_ids"]))
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    source = own_source(tokenizer)
    if source is None:
        raise InputError(
            f"{tokenizer.name_or_path}: its chat templates are {', '.join(tokenizer.chat_template)}, expected one called default"
        )
    template = ChatTemplate(TOKENIZER_OWN, source, (), (), special)
    turns = [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    try:
        text = template.render_chat(turns, add_generation_prompt=False)
    except InputError:
        text = template.render_chat([{"role": "system", "content": ""}, *turns], add_generation_prompt=False)
    ids = cut_left(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], max_length)
    return ids, [0] * len(ids)


def cut_left(tokenizer: PreTrainedTokenizerBase, ids: list[int], max_length: int) -> list[int]:
    """The last `max_length` ids; a BOS or CLS stays before them."""
    kept = 1 if ids[:1] and ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else 0
    return ids if len(ids) <= max_length else ids[:kept] + ids[len(ids) - max_length + kept :]
