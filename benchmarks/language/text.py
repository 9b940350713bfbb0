"""The text of Python's own help topics, every paragraph once, and the part that is held out."""

import hashlib
import re
from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCKS, EVERY = (
    50,
    10,
)  # the text is cut into blocks; each tenth, from the fifth on, is for validation
SEPARATOR = "\n\n"


class Corpus(NamedTuple):
    """Characters as numbers, in the order of the text."""

    training: jax.Array
    validation: jax.Array
    characters: str  # the sorted characters of both parts: number i stands for the i-th
    sha256: str  # of both parts, one behind the other


def load_corpus() -> Corpus:
    training, validation = (SEPARATOR.join(part) for part in split(list_paragraphs()))
    characters = "".join(sorted(set(training + validation)))
    digest = hashlib.sha256((training + SEPARATOR + validation).encode("utf-8")).hexdigest()
    return Corpus(encode(training, characters), encode(validation, characters), characters, digest)


def list_paragraphs() -> list[str]:
    """The paragraphs of all topics, sorted by the names of these, each where it stands first.

    Many topics hold others in full. Two paragraphs that differ in white space alone are one.
    """
    whole = SEPARATOR.join(topics[name] for name in sorted(topics))
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", whole):
        if words := " ".join(paragraph.split()):
            found.setdefault(words, paragraph.rstrip())
    return list(found.values())


def split(paragraphs: list[str]) -> tuple[list[str], list[str]]:
    """For training and for validation: blocks of paragraphs that follow one another."""
    ends = np.cumsum([len(paragraph) for paragraph in paragraphs])
    blocks = (ends - 1) * BLOCKS // ends[-1]
    is_held_out = blocks % EVERY == EVERY // 2
    pairs = list(zip(paragraphs, is_held_out, strict=True))
    return [text for text, out in pairs if not out], [text for text, out in pairs if out]


def encode(text: str, characters: str) -> jax.Array:
    numbers = {character: number for number, character in enumerate(characters)}
    return jnp.asarray([numbers[character] for character in text], jnp.int32)


def draw_windows(key: jax.Array, text: jax.Array, batch: int, context: int) -> jax.Array:
    """(batch, context + 1): windows of the text that begin anywhere, each character as likely."""
    starts = jax.random.randint(key, (batch, 1), 0, len(text) - context)
    return text[starts + jnp.arange(context + 1)[None]]


def cut_windows(text: jax.Array, context: int) -> jax.Array:
    """(windows, context + 1): the whole text, every character but the first predicted once.

    The last character of a window is the first one of the next. What fills no window is left out.
    """
    count = (len(text) - 1) // context
    return text[jnp.arange(count)[:, None] * context + jnp.arange(context + 1)[None]]
