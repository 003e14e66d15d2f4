"""The bundled model: its grammar is deterministic, its files load, and it recalls facts across KV blocks."""

from __future__ import annotations

import itertools
import random
import string
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quire.worker.demo import stories

FOLDER = Path(stories.__file__).resolve().parent
MAX_FOLDER_BYTES = 8_000_000
RECALL_BOUND = 0.9
DISTANCE = 64  # tokens: four KV blocks of 16


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def greedy(prompt_ids: list[int], max_new_tokens: int) -> str:
    ids = torch.tensor([prompt_ids])
    out = model().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)
    return str(tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def chat_ids(messages: list[stories.Message]) -> list[int]:
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer().encode(text, add_special_tokens=False))


def test_stories_are_named_by_their_seed() -> None:
    def made(seed: int) -> list[object]:
        rng = random.Random(seed)
        makers = (stories.story, stories.question, stories.document, stories.dialogue)
        return [make(rng) for make in makers] + [stories.recall(rng, 6, 64)]

    assert made(7) == made(7)
    assert made(7) != made(8)
    assert stories.held_out_recall(5, seed=1) == stories.held_out_recall(5, seed=1)


def test_training_never_shows_a_held_out_pair() -> None:
    rng = random.Random(0)
    held_out = {
        f"{colour} {thing}"
        for colour in stories.COLOURS
        for thing in stories.THINGS
        if stories.is_held_out(colour, thing)
    }
    assert len(held_out) >= 20
    for _ in range(300):
        pieces = stories.recall_document(rng, 6, 60) + stories.document(rng) + stories.dialogue_document(rng)
        text = "".join(piece.text for piece in pieces)
        words = text.translate(str.maketrans("", "", string.punctuation)).split()
        assert held_out.isdisjoint(map(" ".join, itertools.pairwise(words)))


def test_held_out_prompts_span_the_stated_distance() -> None:
    for example in stories.held_out_recall(50, seed=3, distance=DISTANCE):
        end = example.prompt.index(example.fact) + len(example.fact)
        between = example.prompt[end : example.prompt.rindex(". ") + 1]
        assert len(tokenizer().encode(between, add_special_tokens=False)) >= DISTANCE
        assert example.answer in example.choices
        assert len(example.choices) >= 3


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= MAX_FOLDER_BYTES


def test_sizes_divide_for_tensor_parallelism() -> None:
    config = model().config
    for size in (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
    ):
        assert size % 4 == 0
    assert len(tokenizer()) <= config.vocab_size


@pytest.mark.parametrize(
    "text", ["Mia has the key.", " two  spaces\n\ttab", "狐狸和月亮", "🦊👩‍🚀 naïve Ω", "\x00\u200b"]
)
def test_any_text_round_trips(text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False)
    assert tokenizer().decode(ids) == text


def test_plain_text_begins_with_bos_once_and_so_does_a_chat() -> None:
    begin = tokenizer().bos_token_id
    assert tokenizer().encode("Once upon a time")[0] == begin
    ids = chat_ids([{"role": "user", "content": "Hello."}])
    assert ids[0] == begin and ids.count(begin) == 1


def test_chat_template_is_the_format_of_training() -> None:
    messages = [
        {"role": "system", "content": "You are a kind storyteller."},
        {"role": "user", "content": "Who has the red kite?"},
        {"role": "assistant", "content": "Tom."},
        {"role": "user", "content": "Thanks."},
    ]
    for prompted in (False, True):
        text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
        assert text == stories.render(messages, prompted)


def test_generation_stops_at_the_end_of_text_and_of_a_turn() -> None:
    ends = {tokenizer().convert_tokens_to_ids(token) for token in (stories.END, stories.TURN_END)}
    assert set(model().generation_config.eos_token_id) == ends


def test_once_upon_a_time_becomes_a_whole_story() -> None:
    text = greedy(tokenizer().encode("Once upon a time"), 160)
    assert text.rstrip().endswith((".", "?"))
    assert 20 <= len(text.split()) <= 140


def test_recall_across_blocks() -> None:
    """Chance is at most a third, and no memory of the training data helps: only attention does."""
    examples = stories.held_out_recall(24, seed=11, distance=DISTANCE)
    answers = [greedy(tokenizer().encode(example.prompt), 5).strip() for example in examples]
    right = sum(text.startswith(example.answer) for text, example in zip(answers, examples, strict=True))
    assert right / len(examples) >= RECALL_BOUND


def test_recall_in_a_chat() -> None:
    examples = stories.held_out_recall(12, seed=12, distance=DISTANCE)
    right = sum(greedy(chat_ids(example.messages), 5).strip() == example.answer for example in examples)
    assert right / len(examples) >= RECALL_BOUND
