"""Which sizes to run, and what to make of them: no TensorFlow, no I/O, no clock of its own."""

from autobatch.search.driver import search
from autobatch.search.planning import candidate_sizes, make_plan

__all__ = ["candidate_sizes", "make_plan", "search"]
