"""KerasHub's tasks, whose ``fit`` maps a preprocessor over the data: trained, tuned and evaluated as by Keras."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from optional import grain, keras_hub

import autobatch

pytestmark = pytest.mark.filterwarnings("ignore::autobatch.AutobatchWarning")

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
SENTENCES = [" ".join(WORDS[(i * k) % 9] for k in range(1, 3 + i % 4)) for i in range(1, 21)]
LABELS = np.arange(20) % 3


def text_classifier(hub):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = hub.models.BertTokenizer(vocabulary=vocabulary)
    backbone = hub.models.BertBackbone(len(vocabulary), 1, 2, 8, 16, dropout=0.0, max_sequence_length=8)
    preprocessor = hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    return hub.models.BertTextClassifier(backbone, num_classes=3, preprocessor=preprocessor, dropout=0.0)


def causal_lm(hub, *, preprocesses=True):
    vocabulary = {
        word: place for place, word in enumerate(["!", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ġa"])
    }
    tokenizer = hub.models.GPT2Tokenizer(vocabulary=vocabulary, merges=["Ġ a"])
    backbone = hub.models.GPT2Backbone(len(vocabulary), 1, 2, 8, 16, dropout=0.0, max_sequence_length=12)
    preprocessor = hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=12) if preprocesses else None
    return hub.models.GPT2CausalLM(backbone, preprocessor=preprocessor)


def image_classifier(hub):
    backbone = hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(8, 8, 3),
    )
    converter = hub.layers.ImageConverter(image_size=(8, 8), scale=1 / 255)
    preprocessor = hub.models.ResNetImageClassifierPreprocessor(converter)
    return hub.models.ResNetImageClassifier(backbone, num_classes=3, preprocessor=preprocessor)


def images():
    return np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3)).astype("float32")


def tokens():
    ids = np.random.default_rng(0).integers(0, 20, (20, 13))
    return {"token_ids": ids[:, :-1], "padding_mask": np.ones((20, 12), "int32")}, ids[:, 1:]


KINDS = {
    "text": (text_classifier, lambda: (SENTENCES, LABELS)),
    "image": (image_classifier, lambda: (images(), LABELS)),
    "causal": (causal_lm, lambda: (SENTENCES,)),
    "causal without a preprocessor": (lambda hub: causal_lm(hub, preprocesses=False), tokens),
}


def made(kind):
    hub = keras_hub()
    keras.utils.set_random_seed(3)
    build, data = KINDS[kind]
    model = build(hub)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, data()


def require_close(ours, plain):
    # The gradient of attention's key bias is 0 but for rounding, so that nothing is relative to it.
    for actual, expected in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def batched(data):
    return (tf.data.Dataset.from_tensor_slices(data if len(data) > 1 else data[0]).batch(8),)


def a_pair(kind, samples=20):
    """Two models alike, whose updates do not depend on how a batch is cut, and their data."""
    plain, data = made(kind)
    ours, _ = made(kind)
    for layer in plain._flatten_layers(), ours._flatten_layers():
        for each in layer:
            if isinstance(each, keras.layers.BatchNormalization):
                each.trainable = False  # normalises each micro-batch by itself
    for model in (plain, ours):
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return plain, ours, tuple(first_of(part, samples) for part in data)


def first_of(part, samples):
    return part[:samples] if isinstance(part, list) else keras.tree.map_structure(lambda leaf: leaf[:samples], part)


@pytest.fixture(params=["Grain", "no Grain"])
def with_and_without_grain(request, monkeypatch):
    """KerasHub makes batches of arrays by Grain where it is installed, and by tf.data where not."""
    keras_hub()
    from keras_hub.src.utils import pipeline_model

    if request.param == "Grain":
        grain()
    elif getattr(pipeline_model, "grain", None) is not None:
        monkeypatch.setattr(pipeline_model, "grain", None)


@pytest.mark.parametrize(("kind", "samples"), [*((kind, 20) for kind in KINDS), ("text", 5)])
def test_arrays_train_as_by_keras(kind, samples, with_and_without_grain):
    plain, ours, data = a_pair(kind, samples)
    options = {"epochs": 2, "verbose": 0, "shuffle": False}
    expected = plain.fit(*data, batch_size=8, **options)
    history = autobatch.fit(ours, *data, target_batch=8, micro_batch=3, **options)
    require_close(ours, plain)
    np.testing.assert_allclose(history.history["loss"], expected.history["loss"], rtol=1e-5)


def test_batches_train_as_by_keras():
    plain, ours, data = a_pair("text")
    options = {"epochs": 2, "verbose": 0}
    expected = plain.fit(*batched(data), **options)
    history = autobatch.fit(ours, *batched(data), target_batch=8, micro_batch=3, **options)
    require_close(ours, plain)
    np.testing.assert_allclose(history.history["loss"], expected.history["loss"], rtol=1e-5)


class Samples:
    """A source of Grain's."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return keras.tree.map_structure(lambda leaf: leaf[index], self.data)


def test_grains_own_batches_train_as_by_keras_if_they_are_of_the_target():
    plain, ours, data = a_pair("causal without a preprocessor")
    batches = grain().MapDataset.source(Samples(data)).batch(8)
    options = {"epochs": 2, "verbose": 0, "shuffle": False}
    plain.fit(batches, **options)
    autobatch.fit(ours, batches, target_batch=8, micro_batch=3, **options)
    require_close(ours, plain)


def test_grains_own_batches_of_another_size_are_refused_where_their_epochs_would_run_into_each_other():
    _, ours, data = a_pair("causal without a preprocessor")
    batches = grain().MapDataset.source(Samples(data)).batch(4)
    before = ours.get_weights()
    with pytest.raises(ValueError, match="counts 5 of their batches as an epoch.*Received: batches of 4 samples"):
        autobatch.fit(ours, batches, target_batch=8, epochs=2, verbose=0)
    for now, then in zip(ours.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert autobatch.tune(ours, batches, target_batch=8).plan.micro_batch == 8  # reads and does not train


class Stopped(Exception):
    pass


class StopsAt(keras.callbacks.Callback):
    def __init__(self, update):
        super().__init__()
        self.update = update

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == self.update:
            raise Stopped


def test_a_restart_goes_on_as_by_keras(tmp_path, with_and_without_grain):
    plain, ours, data = a_pair("text")
    options = {"epochs": 3, "verbose": 0, "shuffle": False}
    plain.fit(*data, batch_size=8, **options)
    kept = {"target_batch": 8, "micro_batch": 3, "backup": tmp_path / "backup", "backup_every": 1}
    with pytest.raises(Stopped):
        autobatch.fit(ours, *data, **kept, callbacks=[StopsAt(4)], **options)
    _, again, data = a_pair("text")
    autobatch.fit(again, *data, **kept, **options)
    require_close(again, plain)
    assert again.optimizer.iterations == plain.optimizer.iterations


def test_validation_and_class_weights_are_preprocessed_once():
    plain, data = made("text")
    ours, _ = made("text")
    options = {
        "epochs": 1,
        "verbose": 0,
        "validation_data": (SENTENCES[:5], LABELS[:5]),
        "class_weight": {0: 1.0, 1: 3.0, 2: 0.5},
    }
    expected = plain.fit(*data, batch_size=8, **options)
    history = autobatch.fit(ours, *data, target_batch=8, micro_batch=3, **options)
    for name, values in expected.history.items():
        np.testing.assert_allclose(history.history[name], values, rtol=1e-5)
    require_close(ours, plain)


def test_the_search_sees_what_the_preprocessor_makes():
    model, _ = made("image")
    raw = np.zeros((40, 96, 96, 3), "float32")  # 144 times the pixels that the model is given
    preprocessed = model.preprocessor(raw[:1])
    assert preprocessed.shape[1:] == (8, 8, 3)
    report = autobatch.tune(model, raw, np.zeros(40, "int64"), target_batch=40)
    assert report.plan.micro_batch == 40
    peak = max(trial.peak_bytes or 0 for trial in report.trials)
    direct, _ = made("image")
    direct.preprocessor = None
    small = autobatch.tune(direct, np.zeros((40, 8, 8, 3), "float32"), np.zeros(40, "int64"), target_batch=40)
    known = max(trial.peak_bytes or 0 for trial in small.trials)
    assert not known or peak < known + 2 * raw.nbytes
    history = autobatch.fit(model, raw, np.zeros(40, "int64"), target_batch=40, verbose=0)
    assert history.plan.micro_batch == 40
