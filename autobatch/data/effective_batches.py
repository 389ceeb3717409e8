"""Effective batches on the host, made of any data that ``Model.fit`` accepts.

Keras's own data adapters read the data, so the same data are accepted with the same meaning. Their ``tf.data`` datasets
are then cut again into effective batches, by tf.data where all parts of an element have the same number of rows, and
portion by portion where they differ (:mod:`autobatch.data.layouts`). Keras gets the result through its own
``DataAdapter`` interface.

The data can be looked at before training (:meth:`EffectiveBatches.look`) without losing an element and without
changing the order of an epoch. Arrays and PyDatasets are read by index, a ``tf.data.Dataset`` from an independent copy,
a torch loader with the random states put back. Some data are not copied: those that can be read only once, those made
by Python's functions within a dataset, and those too large to copy. Their first effective batch is kept, and the first
epoch begins with it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from autobatch.data import arrays, cardinality, economy, host_memory, layouts, rebatching
from autobatch.data.continuation import ContinuableAdapter, EpochCalls, noted_batches
from autobatch.data.effective_iterator import EffectiveIterator, handed_over
from autobatch.data.first_look import FirstLook, Seen
from autobatch.data.passes import Passes
from autobatch.data.portion_cutter import PortionCutter
from autobatch.errors import warn
from autobatch.records import HostUse
from autobatch.seams import data_adapters, strategies
from autobatch.tensors.batch_structure import Structure, is_missing, rows_of
from autobatch.types import Dataset

EMPTY = "dataset is empty, so that there is nothing to train on. Give at least one sample. Received: "


class EffectiveBatches(ContinuableAdapter):
    """An iterable of effective batches that Keras's ``fit`` accepts as its data.

    Args:
        x, y, sample_weight, shuffle, class_weight, steps_per_epoch: as for ``Model.fit``. A ``tf.data.Dataset`` may
            be one of single samples as well: :func:`autobatch.data.cardinality.is_of_samples` decides.
        target_batch: samples in an effective batch; the last of an epoch may have fewer. Where the parts of an element
            differ in their number of rows, rows of the first part.
        rounds: True if ``target_batch`` was not given by the user, and is rounded where it has to be a multiple.
        input_shapes: name and shape of each of the model's inputs, the batch dimension included; empty if not known.
        validation_data: as for ``Model.fit``; counted in the host memory that will be held, not read.
        only_look: True if the data will not be trained on. A look then reads a copy of a ``tf.data.Dataset`` even if
            that calls Python's functions in it. So the order of the dataset itself does not move on.
        as_they_come: True if the batches of a dataset are effective batches already.
        keeps_order: True if :meth:`position` will be asked for.

    Raises:
        ValueError: the data are empty, the arrays differ in length, Keras refuses them, in its own words, or parts that
            are cut in proportion cannot be cut by ``target_batch``.

    Attributes:
        has_elements: False for arrays, which Keras makes into batches of any size.
        target_batch: portions in an effective batch; everything here counts portions (see :class:`Structure`).
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        target_batch: int,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        steps_per_epoch: int | None = None,
        input_shapes: Sequence[tuple[str, cardinality.Shape]] = (),
        validation_data: Any = None,
        only_look: bool = False,
        rounds: bool = False,
        as_they_come: bool = False,
        keeps_order: bool = False,
    ) -> None:
        arrays.require_usable(x, y, sample_weight)
        if isinstance(x, tf.data.Dataset):
            if int(x.cardinality()) == 0:
                raise ValueError(f"{EMPTY}{x}")
            if cardinality.is_of_samples(x, input_shapes):
                if cardinality.is_of_samples_by_guess(x, input_shapes):
                    warn(layouts.taken_for_samples(x.element_spec))
                x = x.batch(target_batch)
        self._parts = (x, y, sample_weight)
        self._options = {"class_weight": class_weight, "steps_per_epoch": steps_per_epoch}
        self._arrays = data_adapters.are_arrays(x, y, sample_weight)
        self.has_elements = not self._arrays
        self._shuffled = shuffle
        host = host_memory.available()
        copied = host_memory.uses_of_arrays(x, y, sample_weight) if self._arrays else ()
        # Before the copies are made. The size of samples that vary is not known yet.
        beside = host_memory.uses_of_validation(validation_data, sample_bytes=0)
        warned = self._arrays and host_memory.warn_if_short((*copied, *beside), host)

        without_seed = self._arrays and bool(shuffle) and strategies.global_seed() is None
        self._passes = Passes(x, keeps_order=keeps_order, gives_seeds=without_seed)
        with self._passes.looking():
            self._inner = self._adapter_for(self._parts, batch_size=target_batch, shuffle=shuffle)
            self._noted = noted_batches(self._inner, target_batch) if keeps_order else None
            dataset = self._inner.get_tf_dataset() if self._noted is None else self._noted.dataset()
        self._calls = EpochCalls(self._inner, keeps_order=keeps_order)

        self._as_they_come = as_they_come
        self._cut_again = functools.partial(rebatching.Rebatched, as_they_come=as_they_come)
        self._source = dataset
        self._recut: rebatching.Rebatched | None = None
        if data_adapters.is_dataset_adapter(self._inner):
            self._passes.save_iterators_of(dataset)
        again = self._noted is not None
        self._first_look = FirstLook(self._inner, dataset, only_look=only_look, reads_again=again)
        self._iterated = False
        self._looked: Any = None
        self._pending: tuple[Any, Iterator[Any]] | None = None
        self._seen: Seen | None = None
        self._layout = None if self._arrays or layouts.is_surely_even(dataset) else self._read_ahead(target_batch)
        self.target_batch, self._said = target_batch, ""
        if self._layout is not None:
            target_batch = self._layout.rounded(target_batch) if rounds else target_batch
            self._layout = self._layout.for_target(target_batch)
            self.target_batch = self._layout.portions(target_batch)
            self._said = self._layout.sentence(target_batch) if self._layout.portion is None or not rounds else ""
        self._cut(dataset)
        self.sample_limit = self._count_samples()
        self._copied = copied
        self._uses_of_validation = functools.partial(host_memory.uses_of_validation, validation_data)
        self._uses = self._pipeline_uses()
        if not warned:
            host_memory.warn_if_short(self._uses, host)

    def _adapter_for(self, parts: tuple[Any, Any, Any], *, batch_size: int, shuffle: bool) -> Any:
        return arrays.adapter_for(
            *parts, are_arrays=self._arrays, batch_size=batch_size, shuffle=shuffle, **self._options
        )

    def say_how_they_are_cut(self) -> None:
        """Warn of what the user should know of elements whose parts differ in their number of rows."""
        if self._said:
            warn(self._said)
        self._said = ""

    def keep_whole(self, reason: str) -> None:
        """Take each element for one effective batch from now on, before any is trained on, for this ``reason``.

        Raises:
            ValueError: reading has begun, and elements were joined.
        """
        if self._pending is not None:
            raise ValueError(
                f"{reason}, so that elements are neither cut nor joined. Those of this dataset cannot be read again to "
                "take each whole. Leave Python's functions out of the dataset, or make its batches in Python, as a "
                f"keras.utils.PyDataset does. Received: {self._parts[0]!r}"
            )
        if self._seen is None:
            self._read_ahead(self.target_batch)
        assert self._seen is not None
        self._layout = layouts.Layout(None, tuple(rows_of(self._seen.elements[0])), reason)
        self._said = self._layout.sentence(self.target_batch * self.structure.samples_in_portion)
        self.target_batch = 1
        self._looked = None
        self._cut(self._source)
        self.sample_limit = self._count_samples()
        self._uses = self._pipeline_uses()

    def _cut(self, dataset: Dataset) -> None:
        """Make the dataset that is iterated, and what cuts its elements where tf.data does not."""
        self._recut = None
        self._cutter: PortionCutter | None = None
        self._dataset, self.element_spec = dataset, dataset.element_spec
        self._ahead = economy.batches_ahead()
        if self._arrays:
            self._dataset, self._ahead = economy.slices_ahead(dataset)
        if self._layout is not None:
            self.element_spec = self._layout.spec(dataset.element_spec)
            self._dataset = economy.prefetched(dataset, self._ahead)
        elif not self._arrays:
            self._recut = self._cut_again(dataset, self.target_batch, ahead=self._ahead)
            self._dataset, self.element_spec = economy.with_short_queues(self._recut.dataset), self._recut.element_spec
        self._takes_target = self._recut is not None and not self._as_they_come
        padding = [] if self._recut is None else self._recut.padding
        self.structure = Structure(self.element_spec)
        if self._layout is not None or self._seen is not None:
            specs = tf.nest.flatten(dataset.element_spec)
            values = rebatching.padding_values(dataset)
            values = [value for value, spec in zip(values, specs, strict=True) if not is_missing(spec)]
            padding = padding or sorted({str(value) for value in values})
            self._cutter = PortionCutter(self.structure, self.target_batch, values, as_they_come=self._as_they_come)
        self._noting_padding = rebatching.PaddingNote(padding)
        if self.structure.takes_elements_whole:
            self.say_how_they_are_cut()

    def _count_samples(self) -> int | None:
        if self._arrays:
            return data_adapters.array_samples(getattr(self._inner, "inner", self._inner))
        if self._layout is None:
            return cardinality.sample_cardinality(self._source)
        return self._layout.samples_in(self._source)

    # -- the first elements -------------------------------------------------------------------------------------------

    def _read_ahead(self, target_batch: int) -> layouts.Layout | None:
        """Read the first elements, of a copy where there is one, and return how elements are cut."""
        self._dataset = economy.prefetched(self._source)  # the one that is read if there is no copy
        self._seen = seen = self._first_look.elements(target_batch, self._begin)
        if not seen.elements:
            raise ValueError(f"{EMPTY}{self._parts[0]!r}")
        streams = layouts.are_streams(self._source)
        ended = len(seen.elements) < layouts.LOOK
        return layouts.layout_of_elements(
            seen.elements, ended=ended, streams=streams, element_spec=self._source.element_spec
        )

    @property
    def samples_in_each(self) -> int | None:
        """Number of samples in every effective batch, if Keras would know it beforehand; None otherwise."""
        spec, samples = self.element_spec, self.sample_limit
        return None if self._layout else cardinality.samples_in_each(self._source, spec, samples, self.target_batch)

    # -- looking ------------------------------------------------------------------------------------------------------

    def look(self) -> Any:
        """Return an effective batch to take samples from, and leave the data as they were.

        For arrays whose samples differ in size it holds the largest of all, for other data the first samples.

        Raises:
            ValueError: the data are empty.
        """
        if self._looked is None:
            try:
                self._looked = self._look()
            except StopIteration:
                raise ValueError(f"{EMPTY}{self._parts[0]!r}") from None
        return self._looked

    def _look(self) -> Any:
        if self._arrays:
            rows = arrays.longest_rows(self._parts, self.target_batch)
            if rows is None:
                return next(iter(self._dataset))  # each iterator of arrays is independent of the others
            longest = arrays.take_rows(self._parts, rows)
            return next(iter(self._adapter_for(longest, batch_size=len(rows), shuffle=False).get_tf_dataset()))
        if self._seen is not None:
            assert self._cutter is not None
            looked = self._seen.effective_batch(self._cutter, self.structure, self.target_batch)
            if self._seen.of_copy and not self.structure.takes_elements_whole:
                self._seen = None  # nobody needs what was read of the copy any more
            return looked
        source = self._first_look.copy(self.target_batch)
        if source is None:
            return self._first()
        recut = self._cut_again(source, self.target_batch, ahead=0)
        first = next(rebatching.explained(iter(recut.dataset)))
        return first[0] if recut.pads else first

    def _first(self) -> Any:
        if self._pending is None:
            iterator = self._start_where_looked()
            self._pending = (next(iterator), iterator)
        return self._pending[0]

    def _start_where_looked(self) -> Iterator[Any]:
        """Start a pass; if elements of the data themselves were looked at, the pass that begins with them."""
        seen, self._seen = self._seen, None
        if seen is None or seen.of_copy:
            return self._start()
        assert self._cutter is not None
        return self._noting_padding.batches(self._cutter.batches(handed_over(seen.elements, seen.rest)))

    # -- what the host will hold --------------------------------------------------------------------------------------

    def host_uses(self) -> tuple[HostUse, ...]:
        """Return by name the host memory that the input pipelines of training and validation will hold at least."""
        return self._uses

    def bytes_to_come(self, samples: int) -> int:
        """Return the bytes of effective batches under way, without ``samples`` that are on the device already.

        It is 0 if reading the data has begun, since those batches then exist.
        """
        if self._has_begun():
            return 0
        most = self.target_batch if self.sample_limit is None else min(self.target_batch, self.sample_limit)
        # Rows that are read are put together in an array first, and copied from there.
        under_way = 1 + self._ahead + isinstance(self._inner, arrays.MappedArrays)
        batches = min(under_way, self.num_batches or under_way)
        return (batches * most - min(samples, most)) * self._sample_bytes()

    def _pipeline_uses(self) -> tuple[HostUse, ...]:
        sample_bytes, whole = self._sample_bytes(), self.structure.takes_elements_whole
        what = "one element" if whole else f"{self.target_batch * self.structure.samples_in_portion} samples"
        under_way = HostUse(economy.under_way(self._ahead, what), (1 + self._ahead) * self.target_batch * sample_bytes)
        uses = (*self._copied, under_way)
        is_dataset = data_adapters.is_dataset_adapter(self._inner)
        rows = self.structure.samples_in_portion
        if whole:
            known = cardinality.samples_in_element(self._source) if is_dataset else self._first_look.rows_in_first
            rows = known or 1
        row_bytes = -(-sample_bytes // rows)
        if is_dataset:
            read = economy.without_prefetch(self._source)
            uses += host_memory.uses_of_dataset(read, sample_bytes=row_bytes)
        if data_adapters.py_dataset_of(self._inner) is not None:
            self.look()  # only a look shows how large its batches are, and the search will look anyway
        loader, each = self._first_look.loader, self._first_look.rows_in_first
        uses += host_memory.uses_of_loader(loader, sample_bytes=row_bytes, batch_samples=each)
        return uses + self._uses_of_validation(sample_bytes=row_bytes)

    def _sample_bytes(self) -> int:
        known = host_memory.fixed_sample_bytes(self.element_spec)
        return host_memory.mean_bytes(self.structure.leaves(self.look())) if known is None else known

    # -- iterating ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        self._looked = None
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return EffectiveIterator(lambda _: self._continued(kept), behind=kept["taken"])
        if self._pending is not None:
            iterator = handed_over([self._pending[0]], self._pending[1])
            self._pending = None
            return EffectiveIterator(lambda _: iterator)
        if not self._arrays:  # begin now: other readers of data or random numbers then find what they find with Keras
            iterator = self._start_where_looked()
            return EffectiveIterator(lambda _: iterator)
        if self._shuffled:
            return self._passes.in_order(self._start)
        return EffectiveIterator(lambda _: self._start())

    def _start(self) -> Iterator[Any]:
        if self._cutter is not None and self._cutter.met_others:
            self._recut, self._dataset = None, economy.prefetched(self._source)
        iterator = self._begin()
        if self._recut is not None:
            iterator = rebatching.explained(iterator)
            return self._noting_padding.batches(iterator) if self._recut.pads else iterator
        return iterator if self._cutter is None else self._noting_padding.batches(self._cutter.batches(iterator))

    def _begin(self) -> Iterator[Any]:
        # At the end of an epoch of known length Keras starts an iterator that it does not use, which draws from a
        # shuffle's seeds. If the length is unknown only here, draw too, so that the next epoch has Keras's order.
        unread = self._iterated and self.num_batches is None and self._inner.num_batches is not None
        self._iterated = True
        return self._passes.begin(self._dataset, behind_unread=unread, reads_ahead=self._recut is None)

    def _has_begun(self) -> bool:
        return self._pending is not None or (self._seen is not None and not self._seen.of_copy)

    def _forget_look(self) -> None:
        self._pending = self._seen = None

    # -- what Keras asks of a data adapter ----------------------------------------------------------------------------

    def get_tf_dataset(self) -> EffectiveBatches:
        """Return the effective batches themselves; Keras asks for them when training starts."""
        if not self._options["steps_per_epoch"] and cardinality.never_ends(self._inner, self._source):
            # Keras accepts it, and a callback may end it.
            warn(
                "The dataset is infinite and steps_per_epoch is not given, so that the first epoch never ends: no "
                "validation and no callback at the end of an epoch will run. Pass steps_per_epoch, the number of "
                "updates in an epoch.",
            )
        return self

    @property
    def num_batches(self) -> int | None:
        """Updates in an epoch, after which Keras ends it; None if the number is not certain."""
        return cardinality.updates(self.sample_limit, self.target_batch)

    @property
    def expected_batches(self) -> int | None:
        """Updates that an epoch will very likely have, to show progress; None if unknown. It never ends an epoch."""
        samples = self.sample_limit
        if self._layout is not None:
            portions = self._layout.likely_in(self._source) if samples is None else samples
            return cardinality.updates(portions, self.target_batch)
        if samples is None:
            samples = cardinality.sample_cardinality(self._source, trust_maps=True)
        if samples is not None:
            return cardinality.updates(samples, self.target_batch)
        least, most = data_adapters.samples_of_loader(self._inner, self._first_look.rows_in_first)
        fewest = cardinality.updates(least, self.target_batch)
        return fewest if fewest == cardinality.updates(most, self.target_batch) else None

    @property
    def batch_size(self) -> int | None:
        return self.target_batch
