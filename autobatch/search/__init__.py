"""Choice of the sizes to run, and conclusions from their trials: no TensorFlow, no I/O, no clock of its own."""

from autobatch.search.driver import search
from autobatch.search.goal import Goal, Limits, Room
from autobatch.search.planning import candidate_sizes, make_plan

__all__ = ["Goal", "Limits", "Room", "candidate_sizes", "make_plan", "search"]
