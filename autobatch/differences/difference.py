"""Sentences on differences between micro-batches and one batch: the report has all, the warning has one.

Importing this module imports no TensorFlow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PAGE = "docs/exactness-and-limits.md"
"""Page that explains each kind of difference, and what to do about it."""

_MAY = re.compile(r"\bmay\b")


class Difference(str):
    """A sentence on one difference, and the anchor on :data:`PAGE` that explains it."""

    __slots__ = ("anchor",)
    anchor: str

    def __new__(cls, sentence: str, anchor: str) -> Difference:
        """Make the sentence, which is an ordinary ``str`` to everyone else."""
        made = super().__new__(cls, sentence)
        made.anchor = anchor
        return made


def in_short(found: Sequence[str], *, sure: str, unsure: str, listed_in: str) -> str:
    """Return a warning of one difference, the number of the others, and where to read on.

    A difference that is sure is preferred to one that may be.

    Args:
        found: the sentences, at least one.
        sure: introduces a difference that is sure.
        unsure: introduces a difference that may be.
        listed_in: the place where the user finds all of them.
    """
    of_all = [sentence for sentence in found if not _MAY.search(sentence)]
    first = of_all[0] if of_all else found[0]
    others = len(found) - 1
    more = f"; and {others} more {'difference' if others == 1 else 'differences'}" if others else ""
    places = [*([listed_in] if others else []), page_of(first)]
    return f"{sure if of_all else unsure}: {clause_of(first)}{more}. See {' and '.join(places)}."


def clause_of(sentence: str) -> str:
    """Return the first sentence of several, without its full stop."""
    return sentence.split(". ")[0].rstrip(".")


def page_of(sentence: str) -> str:
    """Return the page and anchor that explain a difference; the page alone for a sentence from a saved report."""
    anchor = getattr(sentence, "anchor", "")
    return f"{PAGE}#{anchor}" if anchor else PAGE
