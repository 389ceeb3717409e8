"""Linear forms: sums over samples whose terms depend on the whole batch, as functions of sums that do not.

A sum over samples of ``B x_i + C``, where ``B`` and ``C`` are numbers of the whole batch, is ``B sum x_i + n C``. So
what was added to each sample, or multiplied with each, becomes a factor of a plain sum. An example is a weight that is
divided by the sum of all weights. A plain sum is one that :mod:`autobatch.losses.loss_terms` can weigh.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import tensorflow as tf

from autobatch.graphs.copies import copied
from autobatch.graphs.sample_flow import SampleFlow
from autobatch.types import Tensor

Form = list[tuple[Any, Any]]
"""Terms ``(B, x)``: ``B`` is a number of the batch, None for 1; ``x`` has an entry for each sample, None for 1."""

_MOST_TERMS = 16
_SIGNS = {"Add": (1, 1), "AddV2": (1, 1), "Sub": (1, -1)}
_SHAPES = ("ExpandDims", "Squeeze", "Reshape", "Transpose", "Sum", "Mean")


def as_plain_sums(target: Any, flow: SampleFlow) -> tuple[Any, list[Any]]:
    """Return ``target`` with its sums over samples rewritten, and the samples' tensors that the new sums are made of.

    Return ``target`` itself and an empty list where there is nothing to rewrite, or it cannot be rewritten.
    """
    ends: list[Any] = []
    values: list[Any] = []
    leaves: list[Tensor] = []
    pending, seen = [target], set()
    while pending:
        tensor = pending.pop()
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        found = flow.of(tensor)
        if found.unknown or found.axis is not None or (found.is_plain_sum and not found.mixed):
            continue
        if tensor.op.type in ("Sum", "Mean") and flow.of(tensor.op.inputs[0]).axis is not None:
            rewritten = _rewritten(tensor, flow, leaves)
            if rewritten is not None:
                ends.append(tensor)
                values.append(rewritten)
            continue
        pending += [each for each in tensor.op.inputs if each.dtype != tf.resource]
    return (copied(target, ends, values), leaves) if ends else (target, [])


def _rewritten(total: Any, flow: SampleFlow, leaves: list[Tensor]) -> Any:
    """Rewrite a sum or mean over samples; return None where its terms are not of the form."""
    terms = total.op.inputs[0]
    found = flow.of(terms)
    made_of: list[Any] = []
    form = None if found.selected or terms.shape.rank is None else _form(terms, flow, made_of)
    if form is None or (len(form) == 1 and form[0][0] is None):
        return None
    axis = found.axis
    parts: list[Any] = []
    for factor, x in form:
        mean = None
        if x is not None:
            axis_of_x = flow.of(x).axis
            if axis_of_x is None:
                return None
            mean = tf.reduce_mean(x, axis_of_x, keepdims=True)
        parts.append(mean if factor is None else factor if mean is None else factor * mean)
    shape = tf.tensor_scatter_nd_update(tf.shape(terms), [[axis]], [1])
    result = tf.broadcast_to(functools.reduce(operator.add, parts), shape)
    mean_over_samples = copied(total, [terms], [result])
    leaves += made_of
    if total.op.type == "Mean":
        return mean_over_samples
    return mean_over_samples * tf.cast(tf.shape(terms)[axis], total.dtype)


def _form(tensor: Tensor, flow: SampleFlow, leaves: list[Tensor]) -> Form | None:
    found, op = flow.of(tensor), tensor.op
    if found.unknown or not tensor.dtype.is_floating:
        return None
    if found.axis is None:
        return [(tensor, None)]
    if not found.mixed and not found.added and found.degree is not None and found.linear:
        leaves.append(tensor)
        return [(None, tensor)]
    if op.type in ("Identity", "Neg", "StopGradient", "Cast"):
        if not op.inputs[0].dtype.is_floating:
            return None
        inner = _form(op.inputs[0], flow, leaves)
        if inner is None or op.type == "Neg":
            return None if inner is None else [_negative(term) for term in inner]
        if op.type == "Cast":
            return [(_cast(factor, tensor.dtype), _cast(x, tensor.dtype)) for factor, x in inner]
        return [(_stopped(factor), _stopped(x)) for factor, x in inner] if op.type == "StopGradient" else inner
    if op.type in (*_SIGNS, "AddN"):
        forms = [_form(each, flow, leaves) for each in op.inputs]
        signs = _SIGNS.get(op.type, (1,) * len(forms))
        terms: Form = []
        for form, sign in zip(forms, signs, strict=True):
            if form is None:
                return None
            terms += [_negative(term) if sign < 0 else term for term in form]
        return terms if len(terms) <= _MOST_TERMS else None
    if op.type in ("Mul", "MulNoNan", "RealDiv", "DivNoNan"):
        one, other = (_form(each, flow, leaves) for each in op.inputs)
        return None if one is None or other is None else _product(one, other, divide=not op.type.startswith("Mul"))
    if op.type == "SelectV2":
        return _chosen(tensor, flow, leaves)
    if op.type in _SHAPES:
        inner = _form(op.inputs[0], flow, leaves)
        # A single number is the same in every shape. A factor with a shape of its own would have to follow.
        if inner is None or any(x is None or (each is not None and each.shape.rank != 0) for each, x in inner):
            return None
        if any(x.shape.rank != op.inputs[0].shape.rank for _, x in inner):
            return None
        return [(each, copied(tensor, [op.inputs[0]], [x])) for each, x in inner]
    return None


def _chosen(tensor: Tensor, flow: SampleFlow, leaves: list[Tensor]) -> Form | None:
    """Return the form of a choice between two values for each entry, if the samples themselves decide; else None."""
    condition, *values = tensor.op.inputs
    found = flow.of(condition)
    if found.unknown or found.axis is None or found.mixed or found.added or condition.shape.rank != tensor.shape.rank:
        return None
    one, other = (_form(each, flow, leaves) for each in values)
    if one is None or other is None:
        return None
    chosen, ones = tf.cast(condition, tensor.dtype), tf.ones_like(condition, tensor.dtype)
    terms = [(factor, chosen if x is None else tf.where(condition, x, tf.zeros_like(x))) for factor, x in one]
    return terms + [
        (factor, ones - chosen if x is None else tf.where(condition, tf.zeros_like(x), x)) for factor, x in other
    ]


def _cast(each: Any, dtype: Any) -> Any:
    return None if each is None else tf.cast(each, dtype)


def _stopped(each: Any) -> Any:
    return None if each is None else tf.stop_gradient(each)


def _negative(term: tuple[Any, Any]) -> tuple[Any, Any]:
    factor, x = term
    return (factor, -x) if x is not None else (-factor, None)


def _times(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else one * other


def _product(one: Form, other: Form, *, divide: bool) -> Form | None:
    if len(one) * len(other) > _MOST_TERMS or (divide and len(other) > 1):
        return None
    if not divide:
        return [(_times(a, b), _times(x, y)) for a, x in one for b, y in other]
    ((b, y),) = other
    inverse = None if b is None else tf.math.reciprocal(b), None if y is None else tf.math.reciprocal(y)
    return [(_times(a, inverse[0]), _times(x, inverse[1])) for a, x in one]
