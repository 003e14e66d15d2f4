"""Makes the demo model's whole folder, tokenizer and weights, from nothing but `stories`.

    python -m quire.worker.demo.train --seed 0 --out worker/demo

The lesson that matters is recall: answer a question from a fact named many tokens earlier. It needs attention
over the whole prompt and nothing learnt by heart helps, so the trained model doubles as a test of paged
attention. Three things make it emerge within millions, not billions, of tokens: many questions per document,
with answers that weigh more than text; a curriculum from few facts close by to many facts far away; and, while
the facts are few, a second loss that shows a few heads where to look (`guided_loss_of`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from quire.worker.demo import stories

Model = Any  # transformers' LlamaForCausalLM, whose methods carry no types

VOCAB_SIZE = 800
MAX_POSITIONS = 1024
DENSE = 0.2  # share of the run that trains on facts and questions alone
BATCH_TOKENS = (1536, 3072)  # per step, padding included: while dense, and after
LOCAL_HEADS = (0, 2, 4, 6)  # of the first layer, one per KV head: shown to look 1, 2, 3, 4 tokens back
GUIDED_HEADS = (0, 2)  # of the second layer: shown to look from an answer to its fact
GUIDED_WEIGHT = 0.5  # of either lesson in the loss, while dense
MAX_LENGTH = 384  # tokens of a training document

SAMPLE_MESSAGES = (
    "Tell me a story about a fox.",
    "Mia has the silver key. Tom has the red kite. Who has the red kite?",
)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role: ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|turn_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


# --- tokenizer -------------------------------------------------------------------------------------------


def train_tokenizer(seed: int, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE: the grammar's words become one token each, and any other Unicode text its bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in stories.SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer {seed}")
    texts = ("".join(piece.text for piece in draw(rng, 0.9)) for _ in range(6000))
    specials = stories.SPECIAL_TOKENS
    tokenizer.train_from_iterator((strip(text, specials) for text in texts), trainer)
    begin = (stories.BEGIN, tokenizer.token_to_id(stories.BEGIN))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{stories.BEGIN} $A",
                pair=f"{stories.BEGIN} $A {stories.BEGIN}:1 $B:1",
                special_tokens=[begin],
            ),
        ]
    )
    return tokenizer


def strip(text: str, tokens: tuple[str, ...]) -> str:
    for token in tokens:
        text = text.replace(token, "\n")
    return text


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": stories.BEGIN,
        "eos_token": stories.END,
        "pad_token": stories.PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# Tokens of an answer that say nothing about which fact was asked for.
COMMON = (".", "At", "ĠAt", "The", "ĠThe", "Near", "ĠNear", "Ġthe", stories.TURN_END)


# --- data ------------------------------------------------------------------------------------------------


def draw(rng: random.Random, progress: float) -> list[stories.Piece]:
    """One training document; `progress` in [0, 1] sets how many facts and words it may hold."""
    if progress < DENSE:
        return stories.recall_document(rng, rng.randint(2, 6), 0)
    if rng.random() < 0.6:
        reach = min(1.0, (progress - DENSE) / 0.3)
        num_facts = rng.randint(2, round(6 + 4 * reach))
        return stories.recall_document(rng, num_facts, rng.randint(0, round(30 + 170 * reach)))
    return stories.document(rng) if rng.random() < 0.5 else stories.dialogue_document(rng)


@dataclass(frozen=True)
class Document:
    """Token ids, each one's weight as a target, and (index in an answer, index in its fact) pairs."""

    ids: list[int]
    weights: list[float]
    links: list[tuple[int, int]]


@dataclass(frozen=True)
class Batch:
    """`ids` and `weights` [rows, length], right-padded; `links` [n, 3]: row, index in an answer, in its fact."""

    ids: Tensor
    weights: Tensor
    links: Tensor


def encode(tokenizer: Tokenizer, pieces: list[stories.Piece]) -> Document:
    """A document's tokens, cut at `MAX_LENGTH`."""
    common = {tokenizer.token_to_id(token) for token in COMMON}
    ids: list[int] = []
    weights: list[float] = []
    links: list[tuple[int, int]] = []
    for piece in pieces:
        piece_ids = tokenizer.encode(piece.text, add_special_tokens=False).ids
        if piece.source:
            fact_ids = tokenizer.encode(" " + piece.source, add_special_tokens=False).ids
            links += link(ids, fact_ids, piece_ids, len(ids), common)
        ids += piece_ids
        weights += [min(piece.weight, 1.0) if index in common else piece.weight for index in piece_ids]
    return Document(ids[:MAX_LENGTH], weights[:MAX_LENGTH], [pair for pair in links if pair[0] < MAX_LENGTH])


def link(
    ids: list[int], fact_ids: list[int], answer_ids: list[int], offset: int, common: set[int | None]
) -> list[tuple[int, int]]:
    """Where each informative token of an answer comes from.

    A word that ends its fact is its own source. A name stands first in its fact, before what is asked about
    is known; it comes from the fact's last word, which has seen both.
    """
    size = len(fact_ids)
    starts = [at for at in range(len(ids) - size + 1) if ids[at + 1 : at + size] == fact_ids[1:]]
    starts = [at for at in starts if ids[at] == fact_ids[0]] or [at for at in starts if at <= 3]
    if not starts:
        return []
    made: list[tuple[int, int]] = []
    for index, token in enumerate(answer_ids):
        if token in common:
            continue
        from_end = len(answer_ids) - index
        at = size - 2
        if len(answer_ids) > 2 and fact_ids[-2] in answer_ids:
            at = size - from_end + (answer_ids[-1] != fact_ids[-1])
        made.append((offset + index, starts[0] + at))
    return made


def pad(rows: list[Document]) -> Batch:
    """Right padding needs no mask under causal attention; padding weighs nothing."""
    length = max(len(document.ids) for document in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for row, document in enumerate(rows):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        weights[row, : len(document.ids)] = torch.tensor(document.weights)
    links = [(row, *pair) for row, document in enumerate(rows) for pair in document.links]
    return Batch(ids, weights, torch.tensor(links, dtype=torch.long).view(-1, 3))


def batches(tokenizer: Tokenizer, rng: random.Random, progress: list[float]) -> Iterator[Batch]:
    """Batches of about `BATCH_TOKENS`, of documents alike in length; `progress[0]` is read as it moves."""
    while True:
        documents = [encode(tokenizer, draw(rng, progress[0])) for _ in range(256)]
        limit = BATCH_TOKENS[progress[0] >= DENSE]
        documents.sort(key=lambda document: len(document.ids))
        made: list[Batch] = []
        rows: list[Document] = []
        for document in documents:
            if rows and (len(rows) + 1) * len(document.ids) > limit:
                made.append(pad(rows))
                rows = []
            rows.append(document)
        made.append(pad(rows))
        rng.shuffle(made)
        yield from made


# --- model -----------------------------------------------------------------------------------------------


def build_model(tokenizer: Tokenizer, hidden: int, layers: int) -> Model:
    """A small Llama whose heads, KV heads, intermediate size and vocabulary all divide by four."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(stories.BEGIN),
        eos_token_id=tokenizer.token_to_id(stories.END),
        pad_token_id=tokenizer.token_to_id(stories.PAD),
        initializer_range=0.03,
    )
    model: Model = LlamaForCausalLM(config)
    alias_embeddings(model, tokenizer)
    return model


@torch.no_grad()
def alias_embeddings(model: Model, tokenizer: Tokenizer) -> None:
    """Starts " Mia" and "Mia" from nearly the same embedding, so that copying need not learn they are one."""
    table = model.get_input_embeddings().weight
    vocabulary = tokenizer.get_vocab()
    for token, index in vocabulary.items():
        spaced = vocabulary.get("Ġ" + token)
        if spaced is not None and len(token) > 1:
            table[index] = 0.8 * table[spaced] + 0.6 * table[index]


def optimizers(model: Model, rate: float, matrix_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = set(map(id, matrices))
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    adamw = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    if matrix_rate == 0:
        adamw.add_param_group({"params": matrices, "weight_decay": 0.05})
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def rate_at(progress: float, warm_up: float = 0.02) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to a twentieth."""
    if progress < warm_up:
        return progress / warm_up + 0.01
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def loss_of(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """(weighted mean loss, share of the heavy targets predicted right), both scalars."""
    return score(model(input_ids=batch.ids[:, :-1], use_cache=False).logits, batch)


def score(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """`loss_of` from the logits [rows, length - 1, vocabulary]."""
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    heavy = weights >= stories.ANSWER_WEIGHT
    right = (logits.detach().argmax(-1) == targets)[heavy].float().mean()
    return (losses * weights.flatten()).sum() / weights.sum(), right


def guided_loss_of(model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """`loss_of` plus where to look, and how much of the answers' attention lies where it should.

    Some heads of the first layer learn to look at the tokens just before, so that a fact's last word knows
    its other words; some of the second learn to look from an answer's place back to the fact that gives it.
    Left alone, the model did not get there in as many tokens: each is of no use before the other exists.
    """
    output = model(input_ids=batch.ids[:, :-1], use_cache=False, output_attentions=True)
    loss, right = score(output.logits, batch)
    local = torch.stack(
        [
            output.attentions[0][:, head].diagonal(-back, dim1=1, dim2=2).clamp_min(1e-6).log().mean()
            for back, head in enumerate(LOCAL_HEADS, start=1)
        ]
    )
    rows, answers, sources = batch.links.unbind(1)
    looked = output.attentions[1][:, GUIDED_HEADS].mean(1)[rows, answers - 1, sources]
    loss = loss - GUIDED_WEIGHT * (local.mean() + looked.clamp_min(1e-6).log().mean())
    return loss, right, looked.detach().mean()


# --- evaluation ------------------------------------------------------------------------------------------


@torch.no_grad()
def answered(model: Model, tokenizer: Tokenizer, examples: list[stories.Example]) -> list[bool]:
    """Whether greedy decoding gives each example's answer, both as plain text and as a chat turn.

    The whole answer is fed at once: it is greedy's own choice exactly if every token of it is the arg max.
    """
    results: list[bool] = []
    for example in examples:
        chat = stories.render(example.messages, add_generation_prompt=True)
        right = True
        text = stories.BEGIN + example.prompt
        for prompt, answer in ((text, " " + example.answer), (chat, example.answer)):
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            answer_ids = tokenizer.encode(answer, add_special_tokens=False).ids
            logits = model(input_ids=torch.tensor([prompt_ids + answer_ids]), use_cache=False).logits[0]
            right = right and logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist() == answer_ids
        results.append(right)
    return results


def token_distance(tokenizer: Tokenizer, example: stories.Example) -> int:
    """Tokens between the end of the fact and the start of the question."""
    after = example.prompt.split(example.fact, 1)[1]
    between = after[: after.rfind(". ") + 1]
    return len(tokenizer.encode(between, add_special_tokens=False).ids)


@torch.no_grad()
def evaluate(model: Model, tokenizer: Tokenizer, count: int) -> dict[str, Any]:
    """Held-out scores; `count` prompts for every band of distances."""
    model.eval()
    scores: dict[str, Any] = {}
    for low, high in ((0, 32), (32, 64), (64, 128), (128, 200)):
        rng = random.Random(f"held out {low}")
        examples: list[stories.Example] = []
        while len(examples) < count:
            num_facts = rng.randint(3, 4) if high <= 32 else rng.randint(5, 8)
            example = stories.recall(rng, num_facts, low, "held_out")
            if low <= token_distance(tokenizer, example) < high:
                examples.append(example)
        right = answered(model, tokenizer, examples)
        chance = sum(1 / len(example.choices) for example in examples) / count
        scores[f"recall {low}-{high}"] = {"right": sum(right) / count, "chance": chance, "cases": count}
    rng = random.Random("held out questions")
    examples = [stories.question(rng, "held_out") for _ in range(count)]
    scores["questions"] = {"right": sum(answered(model, tokenizer, examples)) / count, "cases": count}
    rng = random.Random("held out stories")
    begin = stories.Piece(stories.BEGIN, 0.0)
    told = [encode(tokenizer, [begin, stories.Piece(stories.story(rng, "held_out"))]) for _ in range(count)]
    scores["story loss"] = float(loss_of(model, pad(told))[0])
    model.train()
    return scores


def sample(model: Model, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 120) -> str:
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


def save(model: Model, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    ends = [tokenizer.token_to_id(token) for token in (stories.END, stories.TURN_END)]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=model.config.bos_token_id,
        eos_token_id=ends,
        pad_token_id=model.config.pad_token_id,
        max_new_tokens=None,
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    save_tokenizer(tokenizer, out)


# --- the run ---------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer(args.seed)
    model = build_model(tokenizer, args.hidden, args.layers)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    opts = optimizers(model, args.rate, args.matrix_rate)
    peaks = [[group["lr"] for group in opt.param_groups] for opt in opts]
    progress = [0.0]
    stream = batches(tokenizer, random.Random(f"train {args.seed}"), progress)
    start = last_saved = time.monotonic()
    tokens = step = 0
    mean_loss, mean_right = 0.0, 0.0
    while progress[0] < 1.0:
        batch = next(stream)
        looked = torch.tensor(0.0)
        if progress[0] < DENSE:
            model.set_attn_implementation("eager")
            loss, right, looked = guided_loss_of(model, batch)
        else:
            model.set_attn_implementation("sdpa")
            loss, right = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, rates in zip(opts, peaks, strict=True):
            for group, peak in zip(opt.param_groups, rates, strict=True):
                group["lr"] = peak * rate_at(progress[0])
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        tokens += batch.ids.numel()
        blend = min(0.95, 1 - 1 / step)
        mean_loss = blend * mean_loss + (1 - blend) * loss.item()
        if not math.isnan(right.item()):
            mean_right = blend * mean_right + (1 - blend) * right.item()
        now = time.monotonic()
        progress[0] = min(1.0, tokens / args.tokens)
        if step % 100 == 0:
            print(
                f"step {step} {progress[0]:.1%} tokens {tokens:,} ({tokens / (now - start):.0f}/s) "
                f"loss {mean_loss:.3f} answers {mean_right:.1%} looked {looked.item():.2f}",
                flush=True,
            )
        if now - last_saved > 300 or progress[0] >= 1.0:
            last_saved = now
            save(model, tokenizer, args.out)
    print(f"{step} steps, {tokens:,} tokens, {(time.monotonic() - start) / 60:.1f} minutes")
    print(json.dumps(evaluate(model, tokenizer, args.cases), indent=2))
    print(repr(sample(model, tokenizer, stories.BEGIN + "Once upon a time")))
    for content in SAMPLE_MESSAGES:
        prompt = stories.render([{"role": "user", "content": content}], add_generation_prompt=True)
        print(repr(sample(model, tokenizer, prompt)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the demo model and writes its folder.")
    parser.add_argument("--tokens", type=int, default=5_000_000, help="tokens to train on, padding included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate of AdamW")
    parser.add_argument("--matrix-rate", type=float, default=4e-3, help="peak rate of Muon; 0: AdamW for all")
    parser.add_argument("--cases", type=int, default=200, help="held-out cases per score")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
