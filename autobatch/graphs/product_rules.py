"""Rules for what products of matrices make of the samples of a batch. See :mod:`autobatch.graphs.sample_rules`."""

from __future__ import annotations

from dataclasses import replace

from autobatch.graphs.dependence import FREE, Dependence, merged, settled, summed
from autobatch.graphs.sample_rules import Node, rule


@rule("MatMul")
def _matmul(node: Node) -> Dependence:
    first = "ba" if node.op.get_attr("transpose_a") else "ab"
    second = "cb" if node.op.get_attr("transpose_b") else "bc"
    return _contracted(node, first, second, "ac")


@rule("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def _batch_matmul(node: Node) -> Dependence:
    rank, other = node.rank(0), node.rank(1)
    if rank is None or other is None:
        return node.lost("of unknown rank")
    batch = "ABCDEFGHIJ"
    leading = max(rank, other) - 2
    first = batch[leading - rank + 2 : leading] + ("ba" if node.op.get_attr("adj_x") else "ab")
    second = batch[leading - other + 2 : leading] + ("cb" if node.op.get_attr("adj_y") else "bc")
    return _contracted(node, first, second, batch[:leading] + "ac")


@rule("Einsum")
def _einsum(node: Node) -> Dependence:
    inputs, _, output = node.op.get_attr("equation").decode().replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) > 2:
        return node.lost("of more than two")
    if "." in inputs:
        ranks = [node.rank(place) for place in range(len(terms))]
        if None in ranks:
            return node.lost("of unknown rank")
        hidden = [(rank or 0) - len(term.replace("...", "")) for rank, term in zip(ranks, terms, strict=True)]
        names = "0123456789"[: max(hidden)]
        shown = [names[len(names) - count :] if count else "" for count in hidden]
        terms = [term.replace("...", part) for term, part in zip(terms, shown, strict=True)]
        output = output.replace("...", names)
    if len(terms) == 1:
        return _contracted(node, terms[0], "", output)
    return _contracted(node, terms[0], terms[1], output)


def _contracted(node: Node, first: str, second: str, output: str) -> Dependence:
    operands = list(node.inputs[:2])
    terms = [first, second][: len(operands)]
    samples = {term[operand.axis] for term, operand in zip(terms, operands, strict=True) if operand.axis is not None}
    degrees = [each.degree for each in operands]
    degree = None if None in degrees else sum(d for d in degrees if d is not None)
    of_data = [each for each in operands if each.data]
    if not samples:
        linear = len(of_data) < 2 and all(each.linear for each in operands)
        return replace(merged(FREE, operands), degree=degree, linear=linear)
    if len(samples) > 1:
        return node.lost("it sets samples against each other")
    label = samples.pop()
    parts = {each.parts for each in operands if each.axis is not None}
    if len(parts - {None}) > 1:
        return node.lost("of batches of several sizes")
    together = next(each for each in operands if each.axis is not None)
    result = replace(merged(together, operands), degree=degree, linear=True)
    if len(of_data) > 1 and (result.added or any(each.axis is None for each in of_data)):
        result = settled(result)
    if label in output:
        return replace(result, axis=output.index(label))
    return summed(result, node.op.name, mean=False)
