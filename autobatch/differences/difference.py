"""How differences between micro-batches and one batch are said: all in the report, one of them in the warning.

Knows no TensorFlow; importing this imports none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PAGE = "docs/exactness-and-limits.md"
"""The page that explains each kind of difference, and what to do."""

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

    A difference that is sure comes before one that may be. ``sure`` and ``unsure`` introduce either; ``listed_in`` is
    where the user finds all of them.
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
    """Return where a difference is explained; of a sentence from a saved report the page alone is known."""
    anchor = getattr(sentence, "anchor", "")
    return f"{PAGE}#{anchor}" if anchor else PAGE
