"""Effective batches on the host, made of any data that ``Model.fit`` accepts.

Keras's own data adapters read the data, so the same data are accepted with the same meaning. Their ``tf.data`` datasets
are then cut again into effective batches. Keras gets the result through its own ``DataAdapter`` interface.

The data can be looked at before training (:meth:`EffectiveBatches.look`) without losing an element and without
changing the order of an epoch. Arrays and PyDatasets are read by index, a ``tf.data.Dataset`` from an independent copy,
a torch loader with the random states put back. Some data are not copied: those that can be read only once, those made
by Python's functions within a dataset, and those too large to copy. Their first effective batch is kept, and the first
epoch begins with it.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from autobatch.data import arrays, cardinality, host_memory, random_states, rebatching
from autobatch.errors import warn
from autobatch.records import HostUse
from autobatch.seams import data_adapters, tf_data
from autobatch.seams.data_adapters import DataAdapter
from autobatch.tensors.batch_structure import Structure, is_missing
from autobatch.types import Dataset, ElementSpec

_BATCHES_UNDER_WAY = 1 + host_memory.AUTOTUNED_PREFETCH

EMPTY = "dataset is empty, so that there is nothing to train on. Give at least one sample. Received: "


class EffectiveIterator(Iterator[Any]):
    """One pass over effective batches; its type distinguishes it from data that a callback hands to the model.

    The pass may begin only when its first batch is asked for: at the end of an epoch Keras makes a pass that it never
    reads.
    """

    def __init__(self, begin: Callable[[EffectiveIterator], Iterator[Any]]) -> None:
        self._begin = begin
        self._iterator: Iterator[Any] | None = None

    def begin(self) -> Iterator[Any]:
        """Begin the pass, if it has not begun."""
        if self._iterator is None:
            self._iterator = self._begin(self)
        return self._iterator

    def __next__(self) -> Any:
        return next(self.begin())


class EffectiveBatches(DataAdapter):  # type: ignore[misc]
    """An iterable of effective batches that Keras's ``fit`` accepts as its data.

    Args:
        x, y, sample_weight, shuffle, class_weight, steps_per_epoch: as for ``Model.fit``. A ``tf.data.Dataset`` may
            be one of single samples as well: :func:`autobatch.data.cardinality.is_of_samples` decides.
        target_batch: samples in an effective batch; the last of an epoch may have fewer.
        input_shapes: name and shape of each of the model's inputs, the batch dimension included; empty if not known.
        validation_data: as for ``Model.fit``; counted in the host memory that will be held, not read.
        only_look: True if the data will not be trained on. A look then reads a copy of a ``tf.data.Dataset`` even if
            that calls Python's functions in it. So the order of the dataset itself does not move on.
        as_they_come: True if the batches of a dataset are effective batches already.

    Raises:
        ValueError: the data are empty, the arrays differ in length, or Keras refuses them, in its own words.
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
        as_they_come: bool = False,
    ) -> None:
        arrays.require_usable(x, y, sample_weight)
        if isinstance(x, tf.data.Dataset):
            if int(x.cardinality()) == 0:
                raise ValueError(f"{EMPTY}{x}")
            if cardinality.is_of_samples(x, input_shapes):
                x = x.batch(target_batch)
        self.target_batch = target_batch
        self._only_look = only_look
        self._parts = (x, y, sample_weight)
        self._options = {"class_weight": class_weight, "steps_per_epoch": steps_per_epoch}
        self._arrays = data_adapters.are_arrays(x, y, sample_weight)
        self._shuffled = shuffle
        host = host_memory.available()
        copied = host_memory.uses_of_arrays(x, y, sample_weight) if self._arrays else ()
        # Before the copies are made. The size of samples that vary is not known yet.
        beside = host_memory.uses_of_validation(validation_data, sample_bytes=0)
        warned = self._arrays and host_memory.warn_if_short((*copied, *beside), host)

        # Keras reads the first batches of PyDatasets and torch loaders to learn their structure.
        self._states = random_states.RandomStates(x)
        self._inner = self._adapter_for(self._parts, batch_size=target_batch, shuffle=shuffle)
        dataset = self._inner.get_tf_dataset()
        self._states_after: random_states.RandomStates | None = random_states.RandomStates(x)
        self._states.restore()

        self._as_they_come = as_they_come
        self._recut = None if self._arrays else self._cut_again(dataset)
        self._source = dataset
        self._dataset = _untuned(dataset) if self._recut is None else self._recut.dataset
        self.element_spec = dataset.element_spec if self._recut is None else self._recut.element_spec
        self.structure = Structure(self.element_spec)
        self.sample_limit = self._count_samples()
        self._rows_in_first: int | None = None
        self._iterated = False
        self._waiting: list[weakref.ref[EffectiveIterator]] = []
        self._looked: Any = None
        self._pending: tuple[Any, Iterator[Any]] | None = None
        self._warned_of_padding = False
        self._uses = (*copied, *self._pipeline_uses(validation_data))
        if not warned:
            host_memory.warn_if_short(self._uses, host)

    def _cut_again(self, dataset: Dataset) -> rebatching.Rebatched:
        return rebatching.Rebatched(dataset, self.target_batch, as_they_come=self._as_they_come)

    def _adapter_for(self, parts: tuple[Any, Any, Any], *, batch_size: int, shuffle: bool) -> Any:
        x, y, sample_weight = parts
        options = {**self._options, "batch_size": batch_size, "shuffle": shuffle}
        if self._arrays and arrays.any_mapped(x, y):
            return arrays.MappedArrays(x, y, sample_weight, **options)
        with warnings.catch_warnings():
            # shuffle=True may be fit's default rather than the user's choice; Keras would warn that it is ignored.
            warnings.filterwarnings("ignore", message="`shuffle=True` was passed")
            return data_adapters.data_adapter_for(x=x, y=y, sample_weight=sample_weight, **options)

    def _count_samples(self) -> int | None:
        if self._arrays:
            return data_adapters.array_samples(getattr(self._inner, "inner", self._inner))
        return cardinality.sample_cardinality(self._source)

    @property
    def samples_in_each(self) -> int | None:
        """Number of samples in every effective batch, if Keras would know it beforehand; None otherwise.

        Keras knows it of arrays without a remainder, and of batches that drop theirs.
        """
        if _fixed_samples(self.element_spec) is not None:
            return _fixed_samples(self.element_spec)
        if _fixed_samples(self._source.element_spec) is None:
            return None
        samples = self.sample_limit
        divides = cardinality.is_endless(self._source) if samples is None else samples % self.target_batch == 0
        return self.target_batch if divides else None

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
        source = None
        if data_adapters.is_dataset_adapter(self._inner):
            varies = any(spec.dtype == tf.string or None in spec.shape[1:] for spec in self.structure.specs)
            source = tf_data.independent_copy(self._source, keep_order=varies, may_call_python=self._only_look)
        elif data_adapters.signature_of(self._inner) is not None and self._loader is not None:
            source = self._first_of_loader()
        if source is None:
            return self._first()
        recut = self._cut_again(source)
        first = next(iter(recut.dataset))
        return first[0] if recut.pads else first

    @property
    def _loader(self) -> Any:
        """The user's PyDataset or torch loader; None for other data."""
        dataset = data_adapters.py_dataset_of(self._inner)
        return data_adapters.torch_loader_of(self._inner) if dataset is None else dataset

    def _first_of_loader(self) -> Any:
        batches: list[Any] = []
        samples = 0
        with random_states.random_states_kept(self._loader):
            for batch in data_adapters.batches_without_iterating(self._inner):
                batches.append(batch)
                rows = len(tf.nest.flatten(batch)[0])
                self._rows_in_first = self._rows_in_first or rows
                samples += rows
                if samples >= self.target_batch:
                    break
        signature = data_adapters.signature_of(self._inner)
        return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)

    def _first(self) -> Any:
        if self._pending is None:
            iterator = self._start()
            self._pending = (next(iterator), iterator)
        return self._pending[0]

    # -- what the host will hold --------------------------------------------------------------------------------------

    def host_uses(self) -> tuple[HostUse, ...]:
        """Return by name the host memory that the input pipelines of training and validation will hold at least."""
        return self._uses

    def bytes_to_come(self, samples: int) -> int:
        """Return the bytes of effective batches under way, without ``samples`` that are on the device already.

        It is 0 if reading the data has begun, since those batches then exist.
        """
        if self._pending is not None:
            return 0
        most = self.target_batch if self.sample_limit is None else min(self.target_batch, self.sample_limit)
        batches = min(_BATCHES_UNDER_WAY, self.num_batches or _BATCHES_UNDER_WAY)
        return (batches * most - min(samples, most)) * self._sample_bytes()

    def _pipeline_uses(self, validation_data: Any) -> tuple[HostUse, ...]:
        sample_bytes = self._sample_bytes()
        name = f"{_BATCHES_UNDER_WAY} effective batches of {self.target_batch} samples"
        uses = [HostUse(name, _BATCHES_UNDER_WAY * self.target_batch * sample_bytes)]
        if data_adapters.is_dataset_adapter(self._inner):
            uses += host_memory.uses_of_dataset(self._source, sample_bytes=sample_bytes)
        if data_adapters.py_dataset_of(self._inner) is not None:
            self.look()  # only a look shows how large its batches are, and the search will look anyway
        uses += host_memory.uses_of_loader(self._loader, sample_bytes=sample_bytes, batch_samples=self._rows_in_first)
        return (*uses, *host_memory.uses_of_validation(validation_data, sample_bytes=sample_bytes))

    def _sample_bytes(self) -> int:
        known = [host_memory.fixed_bytes(spec) for spec in self.structure.specs]
        if None not in known:
            return sum(size for size in known if size is not None)
        return host_memory.mean_bytes(self.structure.leaves(self.look()))

    # -- iterating ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        self._looked = None
        if self._pending is not None:
            first, rest = self._pending
            self._pending = None
            return EffectiveIterator(lambda _: itertools.chain([first], rest))
        if not self._arrays:  # begin now: other readers of data or random numbers then find what they find with Keras
            iterator = self._start()
            return EffectiveIterator(lambda _: iterator)
        later = EffectiveIterator(self._start_in_order)
        if self._shuffled:
            self._waiting.append(weakref.ref(later))
        return later

    def _start_in_order(self, iterator: EffectiveIterator) -> Iterator[Any]:
        """Start a pass over arrays; if shuffled, start earlier passes first, since each draws from the seeds."""
        while any(waiting() is iterator for waiting in self._waiting):
            earliest = self._waiting.pop(0)()
            if earliest is None:
                self._start()  # nobody will read it
            elif earliest is not iterator:
                earliest.begin()
        return self._start()

    def _start(self) -> Iterator[Any]:
        if self._states_after is not None:
            # Use up the random numbers that Keras's own fit would have used, unless somebody set a seed since.
            self._states_after.replay(self._states, self._parts[0])
            self._states_after = None
        if self._iterated and self.num_batches is None and self._inner.num_batches is not None:
            # At the end of an epoch of known length Keras starts an iterator that it does not use, which draws from
            # a shuffle's seeds. If the length is unknown only here, draw too, so that the next epoch has Keras's order.
            iter(self._dataset)
        self._iterated = True
        iterator = iter(self._dataset)
        return iterator if self._recut is None or not self._recut.pads else self._noting_padding(iterator)

    def _noting_padding(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch, differed in iterator:
            if not self._warned_of_padding and bool(differed):
                self._warned_of_padding = True
                assert self._recut is not None
                warn(
                    "Batches of this dataset that are padded to different lengths come together in one effective "
                    f"batch. They are padded with {' and '.join(self._recut.padding)} to the longest of them. If that "
                    "is not your padding, pad to one length yourself, or let padded_batch be the dataset's last step: "
                    "then what it pads with is known.",
                )
            yield batch

    # -- what Keras asks of a data adapter ----------------------------------------------------------------------------

    def get_tf_dataset(self) -> EffectiveBatches:
        """Return the effective batches themselves; Keras asks for them when training starts."""
        if not self._options["steps_per_epoch"] and self._is_endless():
            # Keras accepts it, and a callback may end it; so it is not refused.
            warn(
                "The dataset is infinite and steps_per_epoch is not given, so that the first epoch never ends: no "
                "validation and no callback at the end of an epoch will run. Pass steps_per_epoch, the number of "
                "updates in an epoch.",
            )
        return self

    def _is_endless(self) -> bool:
        dataset = data_adapters.py_dataset_of(self._inner)
        if dataset is not None:
            return dataset.num_batches is None
        return not self._arrays and cardinality.is_endless(self._source)

    @property
    def num_batches(self) -> int | None:
        """Updates in an epoch, after which Keras ends it; None if the number is not certain."""
        return cardinality.updates(self.sample_limit, self.target_batch)

    @property
    def expected_batches(self) -> int | None:
        """Updates that an epoch will very likely have, to show progress; None if unknown. It never ends an epoch."""
        samples = self.sample_limit
        if samples is None:
            samples = cardinality.sample_cardinality(self._source, trust_maps=True)
        if samples is not None:
            return cardinality.updates(samples, self.target_batch)
        least, most = data_adapters.samples_of_loader(self._inner, self._rows_in_first)
        fewest = cardinality.updates(least, self.target_batch)
        return fewest if fewest == cardinality.updates(most, self.target_batch) else None

    @property
    def batch_size(self) -> int | None:
        return self.target_batch

    @property
    def has_partial_batch(self) -> bool | None:
        return None

    @property
    def partial_batch_size(self) -> int | None:
        return None

    def on_epoch_begin(self) -> None:
        self._inner.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._inner.on_epoch_end()


def _untuned(dataset: Dataset) -> Any:
    """Return a dataset over arrays without tf.data's tuner.

    The tuner could only choose how many slices are cut at once. On a few cores it takes more time than the slices do:
    90 ms of an epoch of 640 ms.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _fixed_samples(element_spec: ElementSpec) -> int | None:
    """Return the number of samples in each batch if the type specs of all its parts have it; None otherwise."""
    sizes = {spec.shape[0] if spec.shape.rank else None for spec in _dense_parts(element_spec)}
    return sizes.pop() if len(sizes) == 1 else None


def _dense_parts(element_spec: ElementSpec) -> list[Any]:
    parts = [part for part in tf.nest.flatten(element_spec) if not is_missing(part)]
    return [part for part in parts if isinstance(part, tf.TensorSpec)]
