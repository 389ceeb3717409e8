"""Which parts of an element have rows that belong together: by the dataset's pipeline, and by its first elements."""

import numpy as np
import pytest
import tensorflow as tf
from models import Subclassed, classifier
from uneven import Elements

import autobatch
from autobatch.data import cardinality, fit_data, layouts
from autobatch.data.loop_batches import element_spec_of
from autobatch.tensors.batch_structure import Structure, UnevenSpec

X = np.random.default_rng(0).normal(size=(192, 6)).astype("float32")
zipped = tf.data.Dataset.zip


def batches(samples, size, drop=False):
    return tf.data.Dataset.from_tensor_slices(X[:samples]).batch(size, drop_remainder=drop)


def rows(*counts):
    """An element whose parts have so many rows each; None is a scalar."""
    return tuple(np.float32(0) if count is None else X[:count] for count in counts)


def generated(elements, *shapes):
    return tf.data.Dataset.from_generator(
        lambda: iter(elements), output_signature=tuple(tf.TensorSpec(shape) for shape in shapes)
    )


def prepared(data, target, *, model=None, **options):
    options = {"options": {"shuffle": False}, **options}
    found, _ = fit_data.prepare_data(model or classifier(), data, None, target_batch=target, **options)
    found.say_how_they_are_cut()
    return found


@pytest.mark.parametrize(
    ("dataset", "even"),
    [
        pytest.param(batches(64, 8).shuffle(3).take(2), True, id="made by batch"),
        pytest.param(batches(64, 8, True).map(lambda x: (x, x[:, 0])), True, id="known sizes that are equal"),
        pytest.param(batches(64, 8).map(lambda x: (x, x[:, 0])), False, id="a map may change rows"),
        pytest.param(zipped((batches(64, 8), batches(64, 8))), True, id="zipped and equal"),
        pytest.param(zipped((batches(64, 8), batches(60, 8))), False, id="zipped, the last may differ"),
        pytest.param(zipped((batches(64, 8), batches(192, 24))), False, id="two sizes"),
        pytest.param(generated([], (None, 6), (None, 6)), False, id="a generator"),
    ],
)
def test_surely_even_or_worth_a_look(dataset, even):
    assert layouts.is_surely_even(dataset) is even


@pytest.mark.parametrize(
    ("elements", "portion"),
    [
        pytest.param([rows(8, 8), rows(5, 5)], "even", id="even"),
        pytest.param([rows(8, 8, 24)] * 3, (1, 1, 3), id="a common measure"),
        pytest.param([rows(24, 8), rows(48, 16)], (3, 1), id="the same proportions"),
        pytest.param([rows(8, 24), rows(8, 24), rows(4, 24)], None, id="other proportions"),
        pytest.param([rows(30, 64)] * 3, None, id="a measure by chance"),
        pytest.param([rows(1, 50)] * 3, None, id="a query and its gallery"),
        pytest.param([rows(18, 23, 4), rows(20, 31, 4)], None, id="a graph"),
        pytest.param([rows(4, 4), rows(6, 9)], None, id="even by chance"),
        pytest.param([rows(8, 24)], None, id="seen once"),
        pytest.param([rows(8, None)] * 3, None, id="a scalar part"),
    ],
)
def test_the_first_elements_decide(elements, portion):
    spec = tuple(tf.TensorSpec((None, 6) if np.ndim(part) else ()) for part in elements[0])
    found = layouts.layout_of_elements(elements, ended=False, streams=False, element_spec=spec)
    assert ("even" if found is None else found.portion) == portion


def test_a_rest_does_not_count_and_streams_may_have_any_proportions():
    spec = (tf.TensorSpec((None, 6)),) * 2
    rest = layouts.layout_of_elements(
        [rows(8, 24), rows(8, 24), rows(3, 24)], ended=True, streams=False, element_spec=spec
    )
    assert rest is not None
    assert rest.portion == (1, 3)
    streams = layouts.layout_of_elements([rows(16, 24)], ended=True, streams=True, element_spec=spec)
    assert streams is not None
    assert streams.portion == (2, 3)
    ragged = (tf.TensorSpec((None, 6)), tf.RaggedTensorSpec((None, None), tf.float32, 1))
    element = (X[:8], tf.RaggedTensor.from_tensor(X[:24]))
    kept = layouts.layout_of_elements([element] * 2, ended=False, streams=True, element_spec=ragged)
    assert kept is not None
    assert kept.portion is None  # the rows of a ragged part are not cut in groups


@pytest.mark.parametrize("drop", [True, False])
def test_zipped_batches_are_no_single_samples(drop):
    streams = zipped((batches(64, 8, drop), batches(192, 24, drop))).prefetch(2)
    assert not cardinality.is_of_samples(streams)
    assert not cardinality.is_of_samples(streams.map(lambda x, u: {"x": x, "u": u}))
    assert not cardinality.is_of_samples(zipped((batches(64, 8, drop), tf.data.Dataset.range(9))))


def test_a_graph_with_one_number_is_no_single_sample():
    graph = generated([], (None, 6), (None, 2), ())
    assert not cardinality.is_of_samples(graph)
    assert cardinality.is_of_samples(generated([], (None, 6), ()))


def test_what_is_taken_for_samples_by_guess_is_said():
    with pytest.warns(autobatch.AutobatchWarning, match="have 8 and 10 rows, so that each element is taken for one"):
        prepared(generated([(np.zeros((8, 8), "f4"), np.zeros(10, "f4"))] * 4, (8, 8), (10,)), 2, model=Subclassed())


@pytest.mark.parametrize("drop", [True, False])
def test_two_streams_are_cut_in_proportion_of_the_first(drop):
    streams = zipped((batches(64, 8, drop), batches(192, 24, drop)))
    with pytest.warns(autobatch.AutobatchWarning, match="an update takes 16 and 48. target_batch=8 makes each"):
        found = prepared(streams, 16)
    sizes = [tuple(len(part) for part in batch) for batch in found]
    assert sizes == [(16, 48)] * 4
    joined = [np.concatenate([batch[place] for batch in found]) for place in (0, 1)]
    np.testing.assert_array_equal(joined[0], X[:64])
    np.testing.assert_array_equal(joined[1], X)
    assert found.num_batches == (4 if drop else None)
    assert found.expected_batches == 4


def test_an_element_is_passed_on_without_a_word_where_it_is_an_update(recwarn):
    found = prepared(zipped((batches(64, 8), batches(192, 24))), 8)
    assert [len(batch[0]) for batch in found] == [8] * 8
    assert not [warning for warning in recwarn if issubclass(warning.category, autobatch.AutobatchWarning)]


def test_a_target_that_cuts_no_portion_is_refused():
    streams = zipped((batches(192, 24), batches(64, 8)))
    with pytest.raises(ValueError, match=r"3 to 1.*must be a multiple of 3: give 6 or 9; 24 makes.*Received.*=8"):
        prepared(streams, 8)
    assert prepared(streams, 8, only_look=True, rounds=True).target_batch == 2


def test_what_lacks_the_proportions_is_an_effective_batch_of_its_own():
    streams = zipped((batches(60, 8), batches(192, 24))).repeat(2)
    with pytest.warns(autobatch.AutobatchWarning, match="cut in proportion"):
        found = prepared(streams, 16)
    whole = [(16, 48)] * 3 + [(8, 24), (4, 24)]
    assert [tuple(len(part) for part in batch) for batch in found] == whole * 2


@pytest.mark.parametrize("kind", ["PyDataset", "generator", "from_generator", "dataset"])
def test_a_graph_is_one_effective_batch_whoever_makes_it(kind):
    graphs = [rows(18, 23, 4), rows(20, 31, 4), rows(12, 40, 4), rows(30, 2, 4)]
    data = {
        "PyDataset": lambda: Elements(graphs),
        "generator": lambda: (graph for graph in graphs),
        "from_generator": lambda: generated(graphs, (None, 6), (None, 6), (None, 6)),
        "dataset": lambda: tf.data.Dataset.range(4).map(
            lambda i: (tf.zeros([18 + i, 6]), tf.zeros([23 * i + 1, 6]), tf.zeros([4, 6]))
        ),
    }[kind]()
    with pytest.warns(autobatch.AutobatchWarning, match=r"no common measure.*target_batch \(16\) is not used"):
        found = prepared(data, 16)
    looked = found.look()
    assert found.target_batch == 1
    passed = list(found)
    assert len(passed) == 4
    assert sum(len(part) for part in looked) == max(sum(map(len, graph)) for graph in passed[:3])


def test_elements_read_ahead_are_not_lost():
    """A generator can be read once: what was looked at comes first, and is cut like the rest."""
    elements = [(X[8 * i : 8 * i + 8], X[24 * i : 24 * i + 24]) for i in range(8)]
    with pytest.warns(autobatch.AutobatchWarning, match="cut in proportion"):
        found = prepared((element for element in elements), 20)
    found.look()
    sizes = [(20, 60)] * 3 + [(4, 12)]
    seen = list(found)
    assert [tuple(len(part) for part in batch) for batch in seen] == sizes
    np.testing.assert_array_equal(np.concatenate([batch[0] for batch in seen]), X[:64])


def test_what_differs_later_is_passed_on_in_every_epoch():
    """Python makes the elements, so that the first pass goes on with those that were looked at."""
    elements = [rows(4, 4), rows(6, 6), rows(5, 5), rows(6, 9), rows(3, 3)]
    found = prepared(generated(elements, (None, 6), (None, 6)), 10)
    sizes = [[tuple(len(part) for part in batch) for batch in found] for _ in range(2)]
    assert sizes == [[(10, 10), (5, 5), (6, 9), (3, 3)]] * 2


def test_streams_of_different_lengths_are_padded_together():
    elements = [(X[:8, :3], X[:16]), (X[:8], X[:16, :5]), (X[:8], X[:16])]
    with pytest.warns(autobatch.AutobatchWarning) as said:
        found = next(iter(prepared(generated(elements, (None, None), (None, None)), 24)))
    assert [part.shape for part in found] == [(24, 6), (48, 6)]
    np.testing.assert_array_equal(found[0][:8, 3:], 0)
    assert "padded with 0" in str(said[-1].message)


RAGGED, SPARSE = tf.ragged.constant([[1.0], [2.0, 3.0]]), tf.sparse.from_dense([[0.0, 1.0], [2.0, 0.0]])


@pytest.mark.parametrize(
    ("element", "rows", "shapes"),
    [
        ((X[:2], RAGGED, SPARSE), None, [(1, 2, 6), (1, 2, None), (1, 2, 2)]),
        ((X[:2], np.array([b"a", b"b", b"c"], object), np.float32(7)), None, [(1, 2, 6), (1, 3), (1,)]),
        ((RAGGED, SPARSE, X[:6]), (1, 1, 3), [(2, None), (2, 2), (2, 3, 6)]),
        ((X[:4], None, X[:6]), (2, 3), [(2, 2, 6), (2, 3, 6)]),
    ],
)
def test_portions_are_taken_apart_and_put_together_again(element, rows, shapes):
    structure = Structure(UnevenSpec(element_spec_of(element), rows))
    leaves = structure.leaves(element)
    assert [tuple(leaf.shape) for leaf in leaves] == shapes
    assert all(spec.is_compatible_with(leaf) for spec, leaf in zip(structure.specs, leaves, strict=True))
    again = tf.function(structure.pack, autograph=False, input_signature=[structure.specs])(leaves)
    for part, before in zip(again, element, strict=True):
        if isinstance(part, tf.SparseTensor):
            part, before = tf.sparse.to_dense(part), tf.sparse.to_dense(before)
        if part is not None:
            np.testing.assert_array_equal(*(np.asarray(getattr(each, "flat_values", each)) for each in (part, before)))
    assert structure.count(element) == (1 if rows is None else 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            lambda: generated([(X[:4], np.float32(1)), (X[:6], np.float32(1))], (None, 6), ()),
            r"differ in size.*padded_batch.*label\[None\].*Received",
        ),
        (
            lambda: Elements([rows(4, 4), rows(6, 6), rows(5, 5), rows(6, 9)]),
            "had the same number of rows in all parts, and this one has not.*Received",
        ),
    ],
)
def test_what_tf_data_cannot_batch_is_refused_in_words(data, message):
    with pytest.raises(ValueError, match=message):
        list(prepared(data(), 2))
