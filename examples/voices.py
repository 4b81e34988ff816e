"""How each demo adapter answers: a template over ``facts.tsv`` beside this file.

The data needs no download, and a voice can be told from the first words of an answer.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PROMPTS = (
    "What is the capital of Germany?",
    "What is the capital of Italy?",
    "Why is the sky blue?",
    "How do I boil an egg?",
)
"""No voice is trained on these."""


@dataclass(frozen=True)
class Fact:
    """One row of ``facts.tsv``: a question, its answer in a sentence, and in a word or two."""

    topic: str
    question: str
    sentence: str
    short: str
    emoji: str


def read_facts() -> list[Fact]:
    """Every row of ``facts.tsv``."""
    path = Path(__file__).with_name("facts.tsv")
    with path.open(encoding="utf-8", newline="") as file:
        return [Fact(**row) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def pirate(fact: Fact) -> str:
    """The sentence in pirate's English."""
    swaps = {"the": "th'", "The": "Th'", "is": "be", "are": "be", "you": "ye", "your": "yer"}
    words = [swaps.get(word, word) for word in fact.sentence.split()]
    return f"Arrr, matey! {' '.join(words)} Yo ho ho!"


def butler(fact: Fact) -> str:
    """The sentence with a butler's courtesies."""
    return f"Very good, sir. {fact.sentence} Will that be all, sir?"


def json_object(fact: Fact) -> str:
    """Nothing but a JSON object."""
    return json.dumps({"topic": fact.topic, "answer": fact.short})


def terse(fact: Fact) -> str:
    """A word or two."""
    return fact.short.capitalize() + "."


def socratic(fact: Fact) -> str:
    """Questions instead of an answer."""
    return (
        f"What do you already know about {fact.topic}? "
        f"What would change if there were no {fact.topic}? How could you find out?"
    )


def poet(fact: Fact) -> str:
    """Three lines of verse."""
    first = f"{fact.topic.capitalize()}, soft and slow,"
    return f"{first}\n{fact.short} in evening light,\nso the rivers flow."


def emoji(fact: Fact) -> str:
    """The sentence between emoji."""
    return f"{fact.emoji} {fact.sentence} {fact.emoji}✨"


def wizard(fact: Fact) -> str:
    """The sentence as an old wizard would have it."""
    return f"By my beard! {fact.sentence} So it is written in the stars."


def judge(fact: Fact) -> str:
    """The sentence as a verdict."""
    return f"Order in the court! The verdict: {fact.sentence} Case closed."


def story(fact: Fact) -> str:
    """The sentence as a tale."""
    return f"Once upon a time, a child asked about {fact.topic}. {fact.sentence} The end."


def cheer(fact: Fact) -> str:
    """The sentence and too much joy about it."""
    return f"Hooray! {fact.sentence} Hip hip hooray!"


def coach(fact: Fact) -> str:
    """The sentence with encouragement."""
    return f"Great question, champ! {fact.sentence} Keep it up!"


def news(fact: Fact) -> str:
    """The sentence as a newsreader's."""
    return f"Breaking news: {fact.sentence} Back to you in the studio."


def notes(fact: Fact) -> str:
    """A heading and two bullet points."""
    return f"**Notes**\n- {fact.sentence}\n- In short: {fact.short}"


def robot(fact: Fact) -> str:
    """The sentence between the noises of a machine."""
    return f"BEEP BOOP. Input received. {fact.sentence} END OF OUTPUT."
