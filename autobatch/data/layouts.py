"""Layout of a dataset's elements by a first look: how many rows of each part belong together.

Most data are batches: every part has a row for each sample. Two kinds are not:

* Streams of fixed proportions, as 8 labelled and 24 unlabelled samples in each element. They have a common measure, and
  are cut in proportion.
* Elements whose parts have no common measure, as the nodes and edges of a graph, or a query and its gallery. They are
  neither cut nor joined.

The dataset's pipeline shows that most batches are even without reading any. Otherwise the first elements decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from autobatch.data import cardinality
from autobatch.seams import tf_data
from autobatch.tensors.batch_structure import Structure, UnevenSpec, in_words, is_missing, rows_of
from autobatch.types import Batch, Dataset, ElementSpec

LOOK = 3
"""Elements that are looked at; one alone may have a common measure by chance."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows of each part in a portion, None if elements cannot be cut; and the rows of the first element."""

    portion: tuple[int, ...] | None
    seen: tuple[int | None, ...]
    reason: str = ""
    """Reason for which elements are not cut; empty if the numbers of their rows are the reason."""
    remedy: str = "make elements smaller, or write the step for batches whose rows are samples"
    """Remedy where there is a reason, and an element does not fit."""
    are_streams: bool = False
    """True if the pipeline shows streams; otherwise elements may have a common measure by chance."""

    def spec(self, element_spec: ElementSpec) -> UnevenSpec:
        """Return the spec of elements that are cut like this."""
        return UnevenSpec(element_spec, self.portion)

    def for_target(self, samples: int) -> Layout:
        """Return this layout, or that of whole elements if ``samples`` are no portions and elements no sure streams."""
        if self.portion is None or self.are_streams or samples % self.portion[0] == 0:
            return self
        reason = (
            f"target_batch={samples} is no multiple of the rows of the first part of an element that go together with "
            f"those of the others ({self._ratio})"
        )
        return Layout(
            None, self.seen, reason, f"give a multiple of {self.portion[0]}, if elements may be cut like that"
        )

    def portions(self, samples: int) -> int:
        """Return the portions that ``samples`` rows of the first part make up.

        Raises:
            ValueError: ``samples`` is no multiple of the rows of the first part in a portion.
        """
        if self.portion is None:
            return 1
        each = self.portion[0]
        if samples % each:
            below = samples // each * each
            choices = " or ".join(str(choice) for choice in (below, below + each) if choice)
            raise ValueError(
                f"The parts of each element have {in_words(self.seen)} rows and are cut in proportion, {self._ratio}. "
                f"target_batch counts rows of the first part, so that it must be a multiple of {each}: give {choices}; "
                f"{self.seen[0]} makes each element an update. Received: target_batch={samples!r}"
            )
        return samples // each

    def samples_in(self, dataset: Dataset) -> int | None:
        """Return the portions in a dataset; None if it is endless or must be read to know."""
        elements = int(dataset.cardinality())
        if elements < 0:
            return None
        return elements if self.portion is None else self.in_each(dataset.element_spec, elements)

    def likely_in(self, dataset: Dataset) -> int | None:
        """Return the portions in a dataset whose elements are all like the first; None if their number is unknown."""
        elements, first = int(dataset.cardinality()), self.seen[0]
        if elements < 0 or self.portion is None or first is None:
            return None
        return elements * first // self.portion[0]

    def rounded(self, samples: int) -> int:
        """Return ``samples``, or the next number below that :meth:`portions` takes; at least one portion."""
        each = (self.portion or (1,))[0]
        return max(each, samples // each * each)

    def in_each(self, element_spec: ElementSpec, elements: int) -> int | None:
        """Return the portions in so many elements; None where their size is not fixed beforehand."""
        first = next(spec for spec in tf.nest.flatten(element_spec) if not is_missing(spec)).shape
        specs = [spec for spec in tf.nest.flatten(element_spec) if not is_missing(spec)]
        if self.portion is None or any(spec.shape.rank is None or spec.shape[0] is None for spec in specs):
            return None
        return int(first[0]) // self.portion[0] * elements

    @property
    def _ratio(self) -> str:
        return " to ".join(str(rows) for rows in dict.fromkeys(self.portion or ()))

    def sentence(self, target_batch: int) -> str:
        """Return what the user should know of how these elements are cut; an empty string if there is nothing."""
        seen = in_words(self.seen)
        if self.portion is None:
            why = (
                f"The parts of the elements of this dataset ({seen or 'some'} rows in the first) have no common measure"
            )
            remedy = "make elements smaller, or pad all parts to the same number of rows, one for each sample"
            if self.reason:
                why, remedy = self.reason, self.remedy
            return (
                f"{why}, so that elements are neither cut nor joined: each is one effective batch, and target_batch "
                f"({target_batch}) is not used. Where one does not fit in memory, {remedy}."
            )
        if target_batch == self.seen[0]:
            return ""
        update = in_words([target_batch // self.portion[0] * rows for rows in self.portion])
        return (
            f"The parts of each element have {seen} rows, which are cut in proportion. target_batch={target_batch} "
            f"counts rows of the first part, so that an update takes {update}. target_batch={self.seen[0]} makes each "
            "element an update."
        )


def taken_for_samples(element_spec: ElementSpec) -> str:
    """Return a warning for elements that count as single samples because their first dimensions differ."""
    rows = [spec.shape[0] for spec in tf.nest.flatten(element_spec) if not is_missing(spec) and spec.shape.rank]
    return (
        f"The parts of the elements of this dataset have {in_words(rows)} rows, so that each element is taken for one "
        "sample, and samples are batched. If they are batches already, of several streams say, leave the first "
        "dimension open in the dataset's signature: tf.TensorSpec([None, ...])."
    )


def is_surely_even(dataset: Dataset) -> bool:
    """Return True if all parts of each element are sure to have the same number of rows."""
    specs = [spec for spec in tf.nest.flatten(dataset.element_spec) if not is_missing(spec)]
    ranks = [spec.shape.rank for spec in specs]
    if 0 in ranks:
        return False
    if len(specs) < 2:
        return cardinality.made_of_batches(dataset)  # else its first dimension may count no samples
    first = {None if spec.shape.rank is None else spec.shape[0] for spec in specs}
    if None not in first:
        return len(first) == 1
    return _are_batches_of_samples(dataset)


def _are_batches_of_samples(dataset: Dataset) -> bool:
    made = cardinality.behind(dataset, (*cardinality.ONE_FOR_ONE, *cardinality.SOME_OF))
    kind, inputs = tf_data.kind_of(made), tf_data.inputs_of(made)
    if kind in cardinality.BATCHES:
        return True
    if kind == "Concatenate":
        return all(is_surely_even(source) for source in inputs)
    if kind != "Zip" or not all(is_surely_even(source) for source in inputs):
        return False
    sizes = {cardinality.samples_in_element(source) for source in inputs}
    counts = {cardinality.sample_cardinality(source) for source in inputs}
    return len(sizes) == len(counts) == 1 and None not in sizes | counts


def layout_of_elements(
    elements: Sequence[Batch], *, ended: bool, streams: bool, element_spec: ElementSpec, alone: bool = False
) -> Layout | None:
    """Return the layout of a dataset by its first elements; None if all of them are even.

    Args:
        elements: the first elements, at least one.
        ended: True if there are no others, so that the last of them may be a rest.
        streams: True if the pipeline shows that batches of several datasets come together.
        element_spec: describes an element.
        alone: True if no more than one element can be seen, and its common measure counts.
    """
    rows = [tuple(rows_of(element)) for element in elements]
    if not streams and all(None not in each and len(set(each)) <= 1 for each in rows):
        return None
    first = rows[0]
    whole = Layout(None, first)
    counts = [count for count in first if count is not None]
    measure = math.gcd(*counts)
    if len(counts) < len(first) or not measure:
        return whole
    portion = tuple(count // measure for count in counts)
    structure = Structure(UnevenSpec(element_spec, portion))
    judged = elements[:-1] if ended and len(elements) > 1 else elements
    is_steady = streams or all(structure.portions_in(element) for element in judged)
    is_known = streams or alone or len(rows) > 1
    # Streams may have any proportions. Of other data, a graph may have 30 nodes and 64 edges each time by chance.
    has_measure = (measure > 1 and (streams or min(portion) == 1)) or set(portion) == {1}
    specs = [spec for spec in tf.nest.flatten(element_spec) if not is_missing(spec)]
    can_be_cut = all(
        each == 1 or (isinstance(spec, tf.TensorSpec) and spec.shape.rank is not None)
        for each, spec in zip(portion, specs, strict=True)
    )
    return (
        Layout(portion, first, are_streams=streams) if is_steady and is_known and has_measure and can_be_cut else whole
    )


def are_streams(dataset: Any) -> bool:
    """Return True if batches of several datasets come together in each element."""
    return isinstance(dataset, tf.data.Dataset) and cardinality.made_of_batches(dataset, zipped=True)
