"""Random draws in the trace of a micro-step: whose they are, and whether micro-batches draw as one batch would.

Every random operation is marked with the layer whose call made it, in functions, branches and loops as well. A draw
counts where its numbers reach the logs or a variable. Its seed tells what differs: one that moves gives new numbers in
each micro-batch; one that stands still repeats the same ones, which differs where their shape depends on the data.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import tensorflow as tf

from autobatch.train import draw_seams

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
"""The types of operations that change a variable, those apart that move the state of a generator."""

_READING_STATE = re.compile(r"ReadVariableOp|ResourceGather|ResourceGatherNd|Rng\w+")
"""The types of operations by which a seed depends on a state."""

_SEED_AT = {"StatelessMultinomial": 2}
"""The input that holds the seed or the key of a stateless draw, where it is not the one behind the shape."""


class Kind(Enum):
    """What the micro-batches of an update draw, compared with one batch."""

    NEW = "new numbers in each micro-batch"
    REPEATED = "the same numbers in each micro-batch"
    UNKNOWN = "unknown: the seed is given to the function that draws"


@dataclass(frozen=True)
class Draw:
    """A draw of random numbers; ``layer`` holds class and name of the layer whose call made it, None outside of any."""

    layer: tuple[str, str] | None
    kind: Kind


def is_drawing(kind: str) -> bool:
    """Return True if operations of this type draw random numbers."""
    return _DRAWING.fullmatch(kind) is not None


def marked() -> contextlib.AbstractContextManager[None]:
    """Mark what draws, while this lasts, with the layer that is running."""
    return draw_seams.operations_marked(lambda kind: is_drawing(kind) or bool(_CALLING.fullmatch(kind)), _mark)


@contextlib.contextmanager
def noted_eagerly(traced: Any) -> Iterator[None]:
    """Set ``traced.draws`` to what is drawn eagerly while this lasts; a seed that is given may stand still."""
    found: dict[Draw, None] = {}

    def note(kind: str) -> None:
        if is_drawing(kind):
            found[Draw(_layer_of(_mark()), Kind.UNKNOWN if kind.startswith("Stateless") else Kind.NEW)] = None

    with draw_seams.eager_operations_noted(note):
        yield
    traced.draws = tuple(found)


def _mark() -> str:
    layer = draw_seams.running_layer()
    return "" if layer is None else f"{type(layer).__name__}\n{layer.name}"


def _layer_of(mark: str) -> tuple[str, str] | None:
    kind, _, name = mark.partition("\n")
    return (kind, name) if name else None


def draws_of(graph: Any, results: Iterable[Any]) -> tuple[Draw, ...]:
    """Return what is drawn in a graph on the way to ``results`` or into a variable, each draw once.

    ``graph`` was made while :func:`marked` lasted; it may still grow.
    """
    if not any(_CALLING.fullmatch(each.type) or is_drawing(each.type) for each in graph.get_operations()):
        return ()
    definition = graph.as_graph_def(add_shapes=True)
    library = {function.signature.name: function for function in definition.library.function}
    constants = {inner.op.name for outer, inner in graph.captures if not hasattr(outer, "graph")}
    results = [part.op.name for part in results if isinstance(part, tf.Tensor) and hasattr(part, "graph")]
    body = _Body({node.name: node for node in definition.node}, results, constants, library)
    return tuple(dict.fromkeys(body.draws("")))


class _Body:
    """The nodes of a graph, or of a function of it."""

    def __init__(self, nodes: dict[str, Any], results: list[str], constants: set[str] | None, library: Any) -> None:
        self._nodes = nodes
        self._results = results
        self._constants = constants  # None within a function, of whose arguments nothing is known
        self._library = library

    @classmethod
    def of_function(cls, function: Any, library: Any) -> _Body:
        results = [_node_of(each) for each in function.ret.values()]
        return cls({node.name: node for node in function.node_def}, results, None, library)

    def draws(self, mark: str) -> Iterator[Draw]:
        """Yield the draws whose numbers are used; ``mark`` is that of the call, for what has none of its own."""
        sinks = [*self._results, *(node.name for node in self._nodes.values() if self.is_writing(node))]
        used = set(self._behind(sinks))
        for name, node in self._nodes.items():
            if name not in used:
                continue
            own = node.attr[draw_seams.OWNER].s.decode() if draw_seams.OWNER in node.attr else ""
            if _CALLING.fullmatch(node.op):
                for inner in self._called_by(node):
                    yield from inner.draws(own or mark)
            elif is_drawing(node.op) and not (name.startswith("gradient_tape/") and not own):
                kind = self._kind_of(node)
                if kind is not None:
                    yield Draw(_layer_of(own or mark), kind)

    def is_writing(self, node: Any) -> bool:
        """Return True if the node changes a variable, in a function that it calls as well."""
        if _WRITING.fullmatch(node.op):
            return True
        if not _CALLING.fullmatch(node.op):
            return False
        return any(inner.is_writing(each) for inner in self._called_by(node) for each in inner._nodes.values())

    def _called_by(self, node: Any) -> list[_Body]:
        """Return the functions that a node may run."""
        named = {key: [value.func.name] for key, value in node.attr.items() if value.HasField("func")}
        named["branches"] = [each.name for value in node.attr.values() for each in value.list.func]
        if "then_branch" in named:
            asked = self._nodes.get(_node_of(node.input[0]))
            if asked is not None and asked.op == "VarIsInitializedOp":
                return []  # a variable's first value, which is drawn once in its life
            if asked is not None and asked.op == "Const":
                named.pop("else_branch" if tf.make_ndarray(asked.attr["value"].tensor) else "then_branch")
        names = [name for each in named.values() for name in each if name in self._library]
        return [_Body.of_function(self._library[name], self._library) for name in names]

    def _behind(self, names: Iterable[str]) -> list[str]:
        """Return the nodes, and arguments, that these depend on, themselves included."""
        pending, found = list(names), dict[str, None]()
        while pending:
            name = pending.pop()
            if name not in found:
                found[name] = None
                node = self._nodes.get(name)
                pending += [] if node is None else [_node_of(each) for each in node.input if not each.startswith("^")]
        return list(found)

    def _kind_of(self, node: Any) -> Kind | None:
        """Return what differs in a draw; None where every micro-batch has the very numbers of the batch."""
        if not node.op.startswith("Stateless"):
            return Kind.NEW
        behind = self._behind([_node_of(node.input[_SEED_AT.get(node.op, 1)])])
        if any(self._is_state(self._nodes[name]) for name in behind if name in self._nodes):
            return Kind.NEW
        if self._depend_on_arguments(behind):
            return Kind.UNKNOWN
        shape = tf.TensorShape(node.attr["_output_shapes"].list.shape[0]) if "_output_shapes" in node.attr else None
        if shape is not None and shape.is_fully_defined():
            return None
        return Kind.REPEATED if self._depend_on_arguments(self._behind([_node_of(node.input[0])])) else None

    def _is_state(self, node: Any) -> bool:
        return bool(_READING_STATE.fullmatch(node.op) or _CALLING.fullmatch(node.op) or is_drawing(node.op))

    def _depend_on_arguments(self, names: list[str]) -> bool:
        given = (name for name in names if name not in self._nodes or self._nodes[name].op == "Placeholder")
        return any(self._constants is None or name not in self._constants for name in given)


def _node_of(reference: str) -> str:
    return reference.partition(":")[0]
