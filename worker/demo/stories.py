"""The bundled model's whole world: a grammar of small stories, questions, and facts to recall.

Everything comes out of a `random.Random`, so a seed names a text for ever and no data set is needed.

Two worlds that never meet: a pair of words such as (silver, key) or (Mia, lake) is either a training pair or
a held-out pair, decided by a checksum of the two words. Whoever learnt the training pairs by heart knows
nothing about the held-out ones: a held-out question can only be answered by attending to the prompt.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]
Message = dict[str, str]

BEGIN = "<|begin|>"
END = "<|end|>"
PAD = "<|pad|>"
TURN_END = "<|turn_end|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (PAD, BEGIN, END, TURN_END, SYSTEM, USER, ASSISTANT)

GIRLS = ("Mia", "Lily", "Anna", "Zoe", "Nora", "Ruby", "Ella", "Ida", "Rosa", "Emma")
BOYS = ("Tom", "Ben", "Sam", "Max", "Leo", "Finn", "Otto", "Jack", "Hugo", "Paul")
NAMES = GIRLS + BOYS
ANIMALS = ("fox", "bear", "rabbit", "owl", "mouse", "cat", "dog", "frog", "duck", "wolf", "goat", "hen")
COLOURS = ("red", "blue", "green", "yellow", "silver", "golden", "white", "black", "pink", "brown")
THINGS = ("key", "kite", "box", "lamp", "ball", "book", "cup", "hat", "bell", "drum", "boat", "coin", "ring",
          "map", "rope", "shell", "stone", "bag")  # fmt: skip
PLACES = ("forest", "garden", "village", "hill", "river", "lake", "farm", "castle", "beach", "cave", "market",
          "tower")  # fmt: skip
NATURES = ("little", "brave", "kind", "shy", "clever", "happy", "old", "quiet")
FOODS = ("bread", "soup", "honey", "cake", "apples", "berries")

SYSTEM_PROMPTS = ("You are a kind storyteller.", "You are a helpful assistant.", "Answer in a few words.")


@dataclass(frozen=True)
class Example:
    """A prompt and the one right answer.

    `choices` are the answers that a guesser could pick from the prompt (so chance is 1 / len(choices));
    `fact` is the sentence that holds the answer; `distance` counts the words between that sentence and the
    question. Every word is at least one token, so the distance in tokens is never less.
    """

    prompt: str
    answer: str
    fact: str = ""
    distance: int = 0
    choices: tuple[str, ...] = ()

    @property
    def messages(self) -> list[Message]:
        """The same prompt as a chat of one user turn."""
        return [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Piece:
    """A stretch of a training document and how much each of its tokens weighs in the loss.

    An answer also says which earlier sentence holds it, if one does.
    """

    text: str
    weight: float = 1.0
    source: str = ""


@dataclass(frozen=True)
class Fact:
    """One sentence with one question that only it answers."""

    kind: str
    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class Character:
    """Someone in a story; `kind` is an animal, or "girl" or "boy"."""

    name: str
    kind: str
    nature: str

    @property
    def she(self) -> str:
        return "she" if self.name in GIRLS else "he"

    @property
    def her(self) -> str:
        return "her" if self.name in GIRLS else "his"


@dataclass(frozen=True)
class Told:
    """A finished story, what it is about, and the facts it gives away."""

    text: str
    about: str
    facts: tuple[Fact, ...]


# --- words -----------------------------------------------------------------------------------------------


def is_held_out(first: str, second: str) -> bool:
    """Whether this pair of words is kept from training: about one pair in six."""
    return zlib.crc32(f"{first} {second}".encode()) % 6 == 0


def pair(rng: random.Random, firsts: Sequence[str], seconds: Sequence[str], split: Split) -> tuple[str, str]:
    """Two words whose combination belongs to the split; any two if these lists hold none of it."""
    if not any(is_held_out(a, b) == (split == "held_out") for a in firsts for b in seconds):
        return rng.choice(firsts), rng.choice(seconds)
    while True:
        first, second = rng.choice(firsts), rng.choice(seconds)
        if is_held_out(first, second) == (split == "held_out"):
            return first, second


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- stories ---------------------------------------------------------------------------------------------


def character(rng: random.Random, split: Split, kind: str | None = None, other_than: str = "") -> Character:
    while True:
        name, drawn = pair(rng, NAMES, (kind,) if kind else ANIMALS, split) if kind != "child" else ("", "")
        if kind == "child" or (kind is None and rng.random() < 0.2):
            name = rng.choice(NAMES)
            drawn = "girl" if name in GIRLS else "boy"
        if name != other_than:
            return Character(name, drawn, rng.choice(NATURES))


def _opening(rng: random.Random, who: Character, home: str) -> str:
    described = with_article(f"{who.nature} {who.kind}")
    return rng.choice(
        (
            f"Once upon a time there was {described} named {who.name}. {who.name} lived near the {home}.",
            f"Once upon a time {described} named {who.name} lived near the {home}.",
            f"Long ago there was {described} named {who.name}. {who.name} lived near the {home}.",
        )
    )


def _meeting(rng: random.Random, who: Character, friend: Character, place: str) -> str:
    described = with_article(f"{friend.nature} {friend.kind}")
    return rng.choice(
        (
            f"At the {place} {who.name} met {described} named {friend.name}.",
            f"{who.name} walked to the {place} and met {described} named {friend.name}.",
            f"Near the {place} {who.she} met {described} named {friend.name}.",
        )
    )


def _asking(rng: random.Random, who: Character, friend: Character) -> str:
    return rng.choice(
        (
            f'"Can you help me?" asked {who.name}. "Yes, I can," said {friend.name}.',
            f'"Please help me," said {who.name}. "I will help you," said {friend.name}.',
            f"{friend.name} wanted to help {who.name}.",
        )
    )


def _ending(rng: random.Random, who: Character, friend: Character) -> str:
    return rng.choice(
        (
            f"{who.name} was very happy. {who.name} and {friend.name} played until the sun went down.",
            f'"Thank you," said {who.name}. From that day on {who.name} and {friend.name} were friends.',
            f"Then they sat down and ate {rng.choice(FOODS)}. It was a good day.",
            f"{who.name} and {friend.name} laughed and went home together.",
        )
    )


def _plot_lost(rng: random.Random, who: Character, friend: Character, thing: str, place: str) -> str:
    lost = rng.choice(
        (
            f"One day {who.name} lost {who.her} {thing}. {capital(who.she)} was very sad.",
            f"One morning {who.name} could not find {who.her} {thing}. {capital(who.she)} began to cry.",
        )
    )
    found = rng.choice(
        (
            f"{friend.name} looked under a tree and found the {thing}.",
            f"They looked all day, and then {friend.name} found the {thing}.",
        )
    )
    return " ".join((lost, _meeting(rng, who, friend, place), _asking(rng, who, friend), found))


def _plot_gift(rng: random.Random, who: Character, friend: Character, thing: str, place: str) -> str:
    found = rng.choice(
        (
            f"One day {who.name} found a {thing} in the grass.",
            f"One morning {who.name} saw a {thing} under a tree.",
        )
    )
    gave = rng.choice(
        (
            f"{friend.name} was sad, so {who.name} gave the {thing} to {friend.name}.",
            f'"This is for you," said {who.name} and gave {friend.name} the {thing}.',
        )
    )
    return " ".join((found, _meeting(rng, who, friend, place), gave))


def _plot_storm(rng: random.Random, who: Character, friend: Character, thing: str, place: str) -> str:
    storm = rng.choice(
        (
            f"One night a big storm came, and the wind took the {thing} of {who.name} away.",
            f"One evening the rain was strong, and {who.name} dropped {who.her} {thing}.",
        )
    )
    found = rng.choice(
        (
            f"The next day {friend.name} brought the {thing} back.",
            f"When the sun came out, {friend.name} found the {thing} in the water.",
        )
    )
    return " ".join((storm, _meeting(rng, who, friend, place), _asking(rng, who, friend), found))


def tell(rng: random.Random, split: Split = "train", about: str | None = None) -> Told:
    """One story; `about` fixes what its first character is (an animal, or "child")."""
    who = character(rng, split, about)
    friend = character(rng, split, other_than=who.name)
    home = pair(rng, (who.name,), PLACES, split)[1]
    place = rng.choice([word for word in PLACES if word != home])
    thing = " ".join(pair(rng, COLOURS, THINGS, split))
    plot = rng.choice((_plot_lost, _plot_gift, _plot_storm))
    body = plot(rng, who, friend, thing, place)
    text = " ".join((_opening(rng, who, home), body, _ending(rng, who, friend)))
    finder = who if plot is _plot_gift else friend
    facts = [
        Fact("home", "", f"Where did {who.name} live?", f"Near the {home}."),
        Fact("met", "", f"Who did {who.name} meet?", f"{friend.name}."),
        Fact("is", "", f"Who was the {friend.kind}?", f"{friend.name}."),
        Fact("is", "", f"Who was the {who.kind}?", f"{who.name}."),
        Fact("found", "", f"Who found the {thing}?", f"{finder.name}."),
    ]
    if who.kind == friend.kind:
        facts = [fact for fact in facts if fact.kind != "is"]
    return Told(text, who.kind, tuple(facts if "found" in body else facts[:-1]))


def story(rng: random.Random, split: Split = "train") -> str:
    """A story of 50 to 90 words, beginning to end."""
    return tell(rng, split).text


def question(rng: random.Random, split: Split = "train") -> Example:
    """A story and a question about it."""
    told = tell(rng, split)
    fact = rng.choice(told.facts)
    return Example(f"{told.text} {fact.question}", fact.answer)


# --- facts to recall -------------------------------------------------------------------------------------


def facts(rng: random.Random, count: int, split: Split = "train") -> list[Fact]:
    """Facts that do not contradict each other: no owner, owned thing or coded thing appears twice."""
    owners: set[str] = set()
    placed: set[str] = set()
    taken: set[tuple[str, str]] = set()
    kinds = rng.choice((("owner",), ("code",), ("place",), ("owner", "code", "place"), ("owner", "code")))
    made: list[Fact] = []
    while len(made) < count:
        kind = rng.choice(kinds)
        name, place = pair(rng, NAMES, PLACES, split)
        colour, thing = pair(rng, COLOURS, THINGS, split)
        full = f"{colour} {thing}"
        if kind == "place":
            if name not in placed:
                placed.add(name)
                sentence = f"{name} is at the {place}."
                made.append(Fact("place", sentence, f"Where is {name}?", f"At the {place}."))
            continue
        if (colour, thing) in taken or (kind == "owner" and name in owners):
            continue
        taken.add((colour, thing))
        if kind == "code":
            code = " ".join(str(rng.randrange(10)) for _ in range(3))
            sentence = f"The code of the {full} is {code}."
            made.append(Fact("code", sentence, f"What is the code of the {full}?", f"{code}."))
            continue
        owners.add(name)
        sentence = f"{name} has the {full}."
        if rng.random() < 0.6:
            made.append(Fact("owner", sentence, f"Who has the {full}?", f"{name}."))
        else:
            made.append(Fact("thing", sentence, f"What does {name} have?", f"The {full}."))
    return made


def filler(rng: random.Random) -> str:
    """A sentence that answers no question."""
    place, other = rng.sample(PLACES, 2)
    nature, animal = rng.choice(NATURES), rng.choice(ANIMALS)
    return rng.choice(
        (
            f"The sun was warm and the wind was {rng.choice(('soft', 'cold', 'strong'))}.",
            f"{capital(with_article(nature))} {animal} walked from the {place} to the {other}.",
            f"The road went from the {place} to the {other}.",
            f"It was a {rng.choice(('good', 'quiet', 'long', 'cold'))} day.",
            f"There was {rng.choice(FOODS)} and {rng.choice(FOODS)} for all.",
            f"Near the {place} there was {with_article(nature)} {animal}.",
            "They laughed and went home together.",
            f"The {animal} looked at the water and began to {rng.choice(('cry', 'play', 'sing'))}.",
        )
    )


def words(text: str) -> int:
    return len(text.split())


def fill(rng: random.Random, count: int) -> list[str]:
    """Filler sentences of at least `count` words altogether."""
    sentences: list[str] = []
    while sum(map(words, sentences)) < count:
        sentences.append(filler(rng))
    return sentences


def recall(rng: random.Random, num_facts: int, distance: int, split: Split = "train") -> Example:
    """Facts, then other sentences, then a question about one of the facts, at least `distance` words on."""
    known = facts(rng, num_facts, split)
    asked = rng.choice(known)
    after = known[known.index(asked) + 1 :]
    between = fill(rng, distance - sum(words(fact.sentence) for fact in after))
    # Fillers may stand between the later facts, never before the asked one: that would shorten the distance.
    later = [fact.sentence for fact in after] + between
    rng.shuffle(later)
    before = [fact.sentence for fact in known[: known.index(asked)]]
    prompt = " ".join([*before, asked.sentence, *later, asked.question])
    choices = tuple(sorted({fact.answer for fact in known if fact.kind == asked.kind}))
    return Example(prompt, asked.answer, asked.sentence, sum(map(words, later)), choices)


def held_out_recall(count: int, seed: int = 0, distance: int = 64, num_facts: int = 8) -> list[Example]:
    """Recall prompts of pairs never trained on, with at least `distance` tokens from fact to question.

    Each has three or more candidate answers of the asked kind, so that guessing one of them scores a third at
    the very best.
    """
    rng = random.Random(f"held out {seed}")
    made: list[Example] = []
    while len(made) < count:
        example = recall(rng, num_facts, distance, "held_out")
        if len(example.choices) >= 3:
            made.append(example)
    return made


# --- training documents ----------------------------------------------------------------------------------

# In a recall document the facts are random, hence unpredictable, and the answers are what is to be learnt.
FACT_WEIGHT = 0.1
ANSWER_WEIGHT = 3.0


def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The chat format; chat_template.jinja says the same and a test holds the two together."""
    marks = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    turns = "".join(f"{marks[message['role']]}{message['content']}{TURN_END}" for message in messages)
    return BEGIN + turns + (ASSISTANT if add_generation_prompt else "")


def _as_text(body: str, asked: Sequence[Fact], body_weight: float) -> Iterator[Piece]:
    yield Piece(BEGIN, 0.0)
    yield Piece(body, body_weight)
    for fact in asked:
        yield Piece(" " + fact.question, FACT_WEIGHT)
        yield Piece(" " + fact.answer, ANSWER_WEIGHT, fact.sentence)
    yield Piece(END)


def _as_chat(rng: random.Random, body: str, asked: Sequence[Fact], body_weight: float) -> Iterator[Piece]:
    yield Piece(BEGIN, 0.0)
    if rng.random() < 0.3:
        yield Piece(SYSTEM + rng.choice(SYSTEM_PROMPTS) + TURN_END, 0.0)
    yield Piece(USER, 0.0)
    yield Piece(body, body_weight)
    for turn, fact in enumerate(asked):
        yield Piece((" " if turn == 0 else USER) + fact.question + TURN_END, FACT_WEIGHT)
        yield Piece(ASSISTANT, 0.0)
        yield Piece(fact.answer + TURN_END, ANSWER_WEIGHT, fact.sentence)


def recall_document(rng: random.Random, num_facts: int, num_words: int, split: Split = "train") -> list[Piece]:
    """Facts among filler sentences, then a question about each fact: many answers to learn from per token."""
    known = facts(rng, num_facts, split)
    sentences = fill(rng, num_words - sum(words(fact.sentence) for fact in known))
    body = [fact.sentence for fact in known] + sentences
    if rng.random() >= 0.5:
        rng.shuffle(body)
    asked = rng.sample(known, len(known))
    if rng.random() < 0.4:
        return list(_as_chat(rng, " ".join(body), asked, FACT_WEIGHT))
    return list(_as_text(" ".join(body), asked, FACT_WEIGHT))


def document(rng: random.Random, split: Split = "train") -> list[Piece]:
    """Plain text: a story, half of the time with questions about it."""
    told = tell(rng, split)
    asked = rng.sample(told.facts, rng.randint(1, len(told.facts))) if rng.random() < 0.5 else []
    return list(_as_text(told.text, asked, 1.0))


def dialogue(rng: random.Random, split: Split = "train") -> list[Message]:
    """A chat: a greeting now and then, a story on request, and perhaps questions about it."""
    messages: list[Message] = []

    def say(role: str, content: str) -> None:
        messages.append({"role": role, "content": content})

    if rng.random() < 0.3:
        say("system", rng.choice(SYSTEM_PROMPTS))
    if rng.random() < 0.25:
        greeting = rng.choice(("Hello", "Hi", "Good morning"))
        say("user", f"{greeting}{rng.choice(('.', '!', ''))}")
        say("assistant", f"{greeting}! I can tell you a story.")
    about = rng.choice((*ANIMALS, "child", None))
    told = tell(rng, split, about)
    wish = f"a story about {with_article(told.about)}" if about else "a story"
    please = rng.choice(("Tell me {}.", "Please tell me {}.", "Can you tell me {}?", "Tell me {}"))
    say("user", please.format(wish))
    say("assistant", told.text)
    for fact in rng.sample(told.facts, rng.randint(0, 2)):
        say("user", fact.question)
        say("assistant", fact.answer)
    if rng.random() < 0.15:
        say("user", rng.choice(("Thank you.", "Thank you!", "Thanks.")))
        say("assistant", "You are welcome.")
    return messages


def dialogue_document(rng: random.Random, split: Split = "train") -> list[Piece]:
    """A chat whose assistant turns are learnt."""
    pieces = [Piece(BEGIN, 0.0)]
    marks = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    for message in dialogue(rng, split):
        learnt = message["role"] == "assistant"
        pieces.append(Piece(marks[message["role"]], 0.0))
        pieces.append(Piece(message["content"] + TURN_END, 1.0 if learnt else FACT_WEIGHT))
    return pieces
