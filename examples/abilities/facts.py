"""Facts that are told in a text and asked for later: their words, and their questions in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation import Question
from mlx_kvret.evaluation.writer import Writer

# answers to choose from, the right one among them
CHOICES = 7
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Kind:
    """Words of a kind of fact; ``begun`` is how its answer begins. Without ``values`` it is a number."""

    told: str
    asked: str
    begun: str
    values: str = ""


# no value is a part of another word that an answer may well have
TOWNS = "Lisbon Oslo Cairo Vienna Dublin Madrid Athens Boston Geneva Naples Prague"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
DOGS = "Rex Max Bella Luna Rocky Daisy Oscar Molly Ginger"
# none of them is worded as a fact that the gates were trained on
IN_PROSE = (
    Kind("{who} keeps the money in a {value}.", "Where does {who} keep the money?",
         "{who} keeps the money in a", "drawer barrel basket lantern bottle teapot clock kettle boot"),
    Kind("The next ship of {who} leaves on {value}.", "When does the next ship of {who} leave?",
         "The next ship of {who} leaves on", DAYS),
    Kind("{who} was born in {value}.", "Where was {who} born?", "{who} was born in", TOWNS),
    Kind("The secret number of {who} is {value}.", "What is the secret number of {who}?",
         "The secret number of {who} is"),
    Kind("The dog of {who} is called {value}.", "What is the dog of {who} called?",
         "The dog of {who} is called", DOGS),
)  # fmt: skip
IN_A_CHAT = (
    *IN_PROSE,
    Kind("The favourite colour of {who} is {value}.", "What is the favourite colour of {who}?",
         "The favourite colour of {who} is", "blue green yellow purple white black brown orange pink"),
    Kind("The birthday of {who} is in {value}.", "In which month is the birthday of {who}?",
         "The birthday of {who} is in",
         "January February April June July August September October November December"),
    Kind("The instrument of {who} is the {value}.", "Which instrument does {who} play?",
         "The instrument of {who} is the", "violin guitar drums flute trumpet cello harmonica"),
    Kind("The profession of {who} is {value}.", "What is the profession of {who}?",
         "The profession of {who} is", "teacher baker lawyer nurse farmer painter pilot sailor tailor"),
    Kind("The car of {who} is a {value}.", "Which car does {who} drive?", "The car of {who} is a",
         "Ford Honda Toyota Volvo Tesla Nissan Porsche"),
)  # fmt: skip
NAMES = (
    "Captain Brown", "Mrs. Carter", "Doctor Evans", "Miss Foster", "Mr. Graham", "Lady Hughes",
    "Sergeant Kelly", "Professor Lewis", "Mr. Morgan", "Mrs. Parker", "Judge Reed", "Miss Turner",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """A fact in words; ``choices`` are its ``value`` and others of its kind that were not told."""

    told: str
    asked: str
    begun: str
    value: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """A fact's question in tokens.

    ``question`` is answered in the model's own words. Then the answer is begun for it: ``begun`` goes on with
    ``value``, and ``choices`` are the tokens, the right one first, by which the alternatives differ there.
    """

    question: Question
    begun: tuple[int, ...]
    value: tuple[int, ...]
    choices: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens up to the last of the value."""
        return self.question.ids + self.begun + self.value


def draw_facts(kinds: Sequence[Kind], rng: np.random.Generator) -> list[Fact]:
    """One of each kind, in random order, about different people and without a value in common."""
    people = rng.permutation(len(NAMES))
    facts = []
    for place, kind in enumerate(kinds[i] for i in rng.permutation(len(kinds))):
        if kind.values:
            values = [str(value) for value in rng.permutation(kind.values.split())[:CHOICES]]
        else:
            digits, rest = rng.permutation(np.arange(1, 10))[:CHOICES], rng.integers(10**4, size=CHOICES)
            values = [f"{digit}{number:04d}" for digit, number in zip(digits, rest, strict=True)]
        words = {"who": NAMES[people[place % len(NAMES)]], "value": values[0]}
        said = (text.format(**words) for text in (kind.told, kind.asked, kind.begun))
        facts.append(Fact(*said, values[0], tuple(values)))
    return facts


def ask(fact: Fact, question: Question, writer: Writer) -> Asked:
    """A question, its begun answer and what it can be.

    Raises:
        ConfigError: the tokenizer does not tell the alternatives apart by one token.
    """
    said = [writer.encode(f" {choice}") for choice in fact.choices]
    # digits stand behind a token of their own in some vocabularies
    same = 0
    while said[0][same:] and len({tokens[same : same + 1] for tokens in said}) == 1:
        same += 1
    differ = tuple(token for tokens in said for token in tokens[same : same + 1])
    if len(set(differ)) != len(said):
        raise ConfigError(
            f"the tokenizer begins two of {', '.join(fact.choices)} with the same token; choose other words"
        )
    return Asked(question, writer.encode(fact.begun) + said[0][:same], said[0][same:], differ)
