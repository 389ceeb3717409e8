"""Random draws in the trace of a micro-step: whose they are, and whether micro-batches draw as one batch would.

Every random operation is marked with the layer whose call made it, in functions, branches and loops as well. A draw
counts where its numbers reach the logs or a variable. Its seed shows what differs. A seed that moves gives new numbers
in each micro-batch. A seed that stands still repeats the same numbers. That differs where their shape depends on the
data.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import tensorflow as tf

from autobatch.seams import random_operations
from autobatch.types import Graph

_DRAWING = re.compile(
    r"(Stateless|Parameterized)?(Random(Uniform|StandardNormal|Normal|Gamma|Poisson|Shuffle|Crop|Binomial)"
    r"|TruncatedNormal|ParameterizedTruncatedNormal|Multinomial|Shuffle|SampleDistortedBoundingBox)(Full)?(Int)?(V\d)?"
    r"|Stateful(RandomBinomial|StandardNormal|TruncatedNormal|Uniform)(Full)?(Int)?(V\d)?"
    r"|(FixedUnigram|LearnedUnigram|LogUniform|ThreadUnsafeUnigram|Uniform)CandidateSampler"
    r"|Fractional(Max|Avg)Pool"
)
"""The types of operations that draw random numbers."""

_CALLING = re.compile(r"(Stateful)?PartitionedCall|(Stateless)?(If|While|Case)")
"""The types of operations whose work is done by functions of the graph."""

_WRITING = re.compile(r"Assign\w*VariableOp|Resource(Apply|Scatter|SparseApply|StridedSliceAssign)\w*")
"""The types of operations that change a variable, except those that move the state of a generator."""

_READING_STATE = re.compile(r"ReadVariableOp|ResourceGather|ResourceGatherNd|Rng\w+")
"""The types of operations through which a seed depends on a state."""

_SEED_AT = {"StatelessMultinomial": 2}
"""Place of the input with the seed or the key of a stateless draw, where it does not follow the shape."""


class DrawKind(Enum):
    """Numbers that the micro-batches of an update draw, compared with one batch."""

    NEW = "new numbers in each micro-batch"
    REPEATED = "the same numbers in each micro-batch"
    UNKNOWN = "not known: the seed is given to the operation, or made of the data"


@dataclass(frozen=True)
class Draw:
    """A draw of random numbers; ``layer`` holds class and name of the layer whose call made it, None outside layers."""

    layer: tuple[str, str] | None
    kind: DrawKind


def is_drawing(kind: str) -> bool:
    """Return True if operations of this type draw random numbers."""
    return _DRAWING.fullmatch(kind) is not None


def marked() -> contextlib.AbstractContextManager[None]:
    """Mark operations that draw within this context, and calls of functions, with the layer that is running."""
    return random_operations.operations_marked(lambda kind: is_drawing(kind) or bool(_CALLING.fullmatch(kind)), _mark)


@contextlib.contextmanager
def noted_eagerly(traced: Any) -> Iterator[None]:
    """Set ``traced.draws`` to what is drawn eagerly within this context; a seed that is given may stand still."""
    found: dict[Draw, None] = {}

    def note(kind: str) -> None:
        if is_drawing(kind):
            found[Draw(_layer_of(_mark()), DrawKind.UNKNOWN if kind.startswith("Stateless") else DrawKind.NEW)] = None

    with random_operations.eager_operations_noted(note):
        yield
    traced.draws = tuple(found)


def _mark() -> str:
    layer = random_operations.running_layer()
    return "" if layer is None else f"{type(layer).__name__}\n{layer.name}"


def _layer_of(mark: str) -> tuple[str, str] | None:
    kind, _, name = mark.partition("\n")
    return (kind, name) if name else None


def draws_of(graph: Graph, results: Iterable[Any]) -> tuple[Draw, ...]:
    """Return the draws in a graph whose numbers reach ``results`` or a variable, each draw once.

    ``graph`` was made within the context of :func:`marked`; it may still grow.
    """
    if not any(_CALLING.fullmatch(each.type) or is_drawing(each.type) for each in graph.get_operations()):
        return ()
    definition = graph.as_graph_def(add_shapes=True)
    functions: dict[str, _Body] = {}
    functions.update((each.signature.name, _Body.of_function(each, functions)) for each in definition.library.function)
    constants = {inner.op.name for outer, inner in graph.captures if not hasattr(outer, "graph")}
    given = [node.name for node in definition.node if node.op == "Placeholder" and node.name not in constants]
    ends = [part.op.name for part in results if isinstance(part, tf.Tensor) and hasattr(part, "graph")]
    body = _Body({node.name: node for node in definition.node}, given, ends, functions)
    return tuple(dict.fromkeys(body.draws("", None)))


class _Body:
    """The nodes of a graph, or of a function of it; ``given`` are the names of its arguments."""

    def __init__(self, nodes: dict[str, Any], given: list[str], results: list[str], functions: Any) -> None:
        self._nodes = nodes
        self._given = {name: place for place, name in enumerate(given)}
        self._results = results
        self._functions = functions

    @classmethod
    def of_function(cls, function: Any, functions: Any) -> _Body:
        """Make the body of a function of the graph's library."""
        signature = function.signature
        results = [_node_of(function.ret[each.name]) for each in signature.output_arg]
        given = [each.name for each in signature.input_arg]
        return cls({node.name: node for node in function.node_def}, given, results, functions)

    def draws(self, mark: str, call: _Call | None) -> Iterator[Draw]:
        """Yield the draws whose numbers are used; ``mark`` is the call's, for operations without one of their own."""
        sinks = [*self._results, *(node.name for node in self._nodes.values() if self._is_writing(node))]
        used = set(self._behind(sinks))
        for name, node in self._nodes.items():
            if name not in used:
                continue
            own = node.attr[random_operations.OWNER].s.decode() if random_operations.OWNER in node.attr else ""
            for inner in self._called_by(node):
                yield from inner.draws(own or mark, _Call(self, node, call))
            if is_drawing(node.op) and not (name.startswith("gradient_tape/") and not own):
                kind = self._kind_of(node, call)
                if kind is not None:
                    yield Draw(_layer_of(own or mark), kind)

    def _is_writing(self, node: Any) -> bool:
        return self._holds(node, lambda each: bool(_WRITING.fullmatch(each.op)))

    def _is_state(self, node: Any) -> bool:
        return self._holds(node, lambda each: bool(_READING_STATE.fullmatch(each.op)) or is_drawing(each.op))

    def _holds(self, node: Any, is_it: Callable[[Any], bool]) -> bool:
        """Return True if ``is_it`` holds for a node, or for one in a function that it calls."""
        inside = (inner._holds(each, is_it) for inner in self._called_by(node) for each in inner._nodes.values())
        return is_it(node) or any(inside)

    def _called_by(self, node: Any) -> list[_Body]:
        """Return the functions that a node may run."""
        if not _CALLING.fullmatch(node.op):
            return []
        named = {key: [value.func.name] for key, value in node.attr.items() if value.HasField("func")}
        named["branches"] = [each.name for value in node.attr.values() for each in value.list.func]
        if "then_branch" in named:
            asked = self._nodes.get(_node_of(node.input[0]))
            if asked is not None and asked.op == "VarIsInitializedOp":
                return []  # a variable's first value, which is drawn once in its life
            if asked is not None and asked.op == "Const":
                named.pop("else_branch" if tf.make_ndarray(asked.attr["value"].tensor) else "then_branch")
        return [self._functions[name] for each in named.values() for name in each if name in self._functions]

    def _behind(self, names: Iterable[str]) -> list[str]:
        """Return the names of the nodes and arguments that these depend on, themselves included."""
        pending, found = list(names), dict[str, None]()
        while pending:
            name = pending.pop()
            if name not in found:
                found[name] = None
                node = self._nodes.get(name)
                pending += [] if node is None else [_node_of(each) for each in node.input if not each.startswith("^")]
        return list(found)

    def _kind_of(self, node: Any, call: _Call | None) -> DrawKind | None:
        """Return what differs in a draw; None where every micro-batch has the very numbers of the batch."""
        if not node.op.startswith("Stateless"):
            return DrawKind.NEW
        seed_of = self._origin([_node_of(node.input[_SEED_AT.get(node.op, 1)])], call)
        if seed_of is _Origin.STATE:
            return DrawKind.NEW
        shape = tf.TensorShape(node.attr["_output_shapes"].list.shape[0]) if "_output_shapes" in node.attr else None
        is_of_one_size = shape is not None and shape.is_fully_defined()
        if seed_of is _Origin.DATA:
            # In a function, it is drawn for each sample, as by tf.map_fn, with the sample's own seed.
            return None if is_of_one_size and call is not None else DrawKind.UNKNOWN
        if is_of_one_size or self._origin([_node_of(node.input[0])], call) is _Origin.CONSTANT:
            return None
        return DrawKind.REPEATED

    def _origin(self, names: list[str], call: _Call | None) -> _Origin:
        """Return what these depend on, inside of the function and, through its arguments, outside."""
        behind = self._behind(names)
        places = {self._given[name] for name in behind if name in self._given}
        if call is not None and call.node.op.endswith("While"):
            # What a loop carries comes from the round before.
            carried = [self._results[place] for place in places if place < len(self._results)]
            behind += self._behind(carried)
            places = {self._given[name] for name in behind if name in self._given}
        if any(self._is_state(self._nodes[name]) for name in behind if name in self._nodes):
            return _Origin.STATE
        if not places:
            return _Origin.CONSTANT
        if call is None:
            return _Origin.DATA
        first = 0 if call.node.op.endswith(("Call", "While")) else 1  # a condition's or a case's is the choice
        outside = [_node_of(call.node.input[first + place]) for place in places]
        return call.outer._origin(outside, call.outer_call)


class _Origin(Enum):
    """Origin of a tensor: a state that moves counts before anything else, then what the step is given."""

    CONSTANT = "neither"
    DATA = "what the step is given"
    STATE = "a variable, or another draw"


@dataclass(frozen=True)
class _Call:
    """A call of a function: the graph that it stands in, its node there, and the call of that graph's own function."""

    outer: _Body
    node: Any
    outer_call: _Call | None


def _node_of(reference: str) -> str:
    return reference.partition(":")[0]


_HIDDEN = re.compile(
    r"(Parameterized)?(Random(Uniform|StandardNormal|Gamma|Poisson|Shuffle)|TruncatedNormal|TruncatedNormal"
    r"|Multinomial)(Int)?(V\d)?"
)
"""The types of operations that draw from a state of their own, which nobody can read."""


def hidden_draws(graph: Graph) -> set[str]:
    """Return the types of operations in a trace, its functions included, whose random state is no variable's."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    return {node.op for node in nodes if _HIDDEN.fullmatch(node.op)}
