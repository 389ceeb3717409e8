"""How far the steps of Keras's own examples are from plain Keras when they are cut into micro-batches.

``python benchmarks/keras_examples.py [--output results/keras_examples.json]``

Each case is a small model of this script's own whose ``train_step`` computes what an example's step computes: its loss,
the parts of its data and its assignments. Layers are small and dense, and noise is a function of the data, since draws
differ for each micro-batch in any case. Two epochs of SGD at an effective batch of 8 samples (of the first part) are
compared with ``Model.fit``: once in micro-batches of 3, once as a whole. The figure is the norm of the difference of
all weights, over the norm of what plain training has changed. "said" is what is said before training.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import autobatch

RANDOM = np.random.default_rng(0)
X, U = (RANDOM.normal(size=(samples, 6)).astype("float32") for samples in (64, 192))
Y = RANDOM.integers(0, 4, 64)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
mean, total = tf.reduce_mean, tf.reduce_sum


class Quantizer(layers.Layer):
    def build(self, shape):
        self.codes = self.add_weight(shape=(5, 4), initializer="random_normal", name="codes")

    def call(self, inputs):
        distances = total((inputs[:, None] - self.codes[None]) ** 2, -1)
        quantized = tf.matmul(tf.one_hot(tf.argmin(distances, 1), 5), self.codes)
        self.add_loss(0.25 * mean((tf.stop_gradient(quantized) - inputs) ** 2))
        self.add_loss(mean((quantized - tf.stop_gradient(inputs)) ** 2))
        return inputs + tf.stop_gradient(quantized - inputs)


class Example(keras.Model):
    """A model whose step differentiates ``loss(model, data)``; ``after`` runs behind the update."""

    def __init__(self, loss, after=None, quantizes=False):
        super().__init__()
        self.net = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="tanh"), layers.Dense(4)])
        self.other = keras.models.clone_model(self.net)
        self.back = keras.Sequential([keras.Input((4,)), layers.Dense(6)])
        self.quantizer = Quantizer() if quantizes else None
        self.graph = tf.constant(U[:20])
        self.loss_of, self.after = loss, after
        self.tracker = keras.metrics.Mean(name="loss")

    def call(self, inputs):
        return self.net(inputs)

    @property
    def metrics(self):
        return [self.tracker]

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.loss_of(self, data)
        weights = self.trainable_variables
        self.optimizer.apply_gradients(
            (gradient, weight)
            for gradient, weight in zip(tape.gradient(loss, weights), weights, strict=True)
            if gradient is not None
        )
        if self.after is not None:
            self.after(self)
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}


def vae(model, x):
    hidden = model.net(x)
    centre, width = hidden[:, :2], hidden[:, 2:]
    drawn = tf.concat([centre + tf.exp(0.5 * width) * x[:, :2], centre], 1)
    kl = -0.5 * total(1 + width - centre**2 - tf.exp(width), 1)
    return mean(total((model.back(drawn) - x) ** 2, 1)) + mean(kl)


def vq_vae(model, x):
    return mean((model.back(model.quantizer(model.net(x))) - x) ** 2) / 0.7 + sum(model.quantizer.losses)


def real_nvp(model, x):
    hidden = model.net(x)
    return -mean(-0.5 * total(hidden**2, 1) + total(tf.tanh(hidden), 1))


def ddpm(model, x):
    noise = x[:, ::-1]
    return keras.losses.MeanSquaredError()(noise, model.back(model.net(0.8 * x + 0.6 * noise)))


def moving_average(model):
    for weight, average in zip(model.net.weights, model.other.weights, strict=True):
        average.assign(0.9 * average + 0.1 * weight)


def distillation(model, data):
    x, y = data
    teacher, student = tf.stop_gradient(model.other(x)), model.net(x)
    apart = keras.losses.KLDivergence()(tf.nn.softmax(teacher / 10.0), tf.nn.softmax(student / 10.0))
    return 0.1 * CROSS_ENTROPY(y, student) + 0.9 * apart


def simsiam(model, data):
    one, other = (tf.math.l2_normalize(model.net(view), 1) for view in data)
    return -mean(total(one * tf.stop_gradient(other), 1)) / 2 - mean(total(other * tf.stop_gradient(one), 1)) / 2


def triplets(model, data):
    anchor, positive, negative = (model.net(part) for part in data)
    return tf.maximum(total((anchor - positive) ** 2, -1) - total((anchor - negative) ** 2, -1) + 0.5, 0.0)


def pairs(model, data):
    one, other, y = data
    distance = tf.sqrt(total((model.net(one) - model.net(other)) ** 2, 1) + 1e-6)
    y = tf.cast(y > 1, tf.float32)
    return mean((1 - y) * distance**2 + y * tf.maximum(1 - distance, 0) ** 2)


def cluster_entropy(model, x):
    shares = mean(tf.nn.softmax(model.net(x)), 0)
    return np.log(4.0) + total(shares * tf.math.log(tf.clip_by_value(shares, 1e-8, 1.0)))


def masked_language(model, data):
    x, y = data
    weight = tf.cast(x[:, 0] > 0, tf.float32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)(y, model.net(x), weight)
    return keras.ops.sum(loss)


def masked_image(model, x):
    patches = tf.reshape(x, [-1, 3, 2])
    places = tf.argsort(patches[:, :, 0], 1)[:, :2]
    rebuilt = tf.reshape(model.back(model.net(x)), [-1, 3, 2])
    given, made = (tf.gather(part, places, axis=1, batch_dims=1) for part in (patches, rebuilt))
    return keras.losses.MeanSquaredError()(given, made)


def graph_of_the_model(model, data):
    numbers, y = data
    return CROSS_ENTROPY(y, tf.gather(model.net(model.graph), numbers))


def info_nce(model, views):
    one, other = (tf.math.l2_normalize(model.net(view), 1) for view in views)
    return CROSS_ENTROPY(tf.range(tf.shape(one)[0]), tf.matmul(one, other, transpose_b=True) / 0.1)


def supervised_contrastive(model, data):
    x, y = data
    features = tf.math.l2_normalize(model.net(x), 1)
    same = tf.cast(y[:, None] == y[None], tf.float32)
    targets = same / total(same, 1, keepdims=True)
    return mean(
        tf.nn.softmax_cross_entropy_with_logits(targets, tf.matmul(features, features, transpose_b=True) / 0.05)
    )


def barlow(model, views):
    one, other = (model.net(view) for view in views)
    one, other = ((part - mean(part, 0)) / tf.math.reduce_std(part, 0) for part in (one, other))
    correlation = tf.matmul(one, other, transpose_a=True) / 8.0
    off = tf.linalg.set_diag(correlation, tf.zeros(4))
    return total((tf.linalg.diag_part(correlation) - 1) ** 2) + 5e-3 * total(off**2)


def simclr(model, data):
    u, (x, y) = data
    images = tf.concat([u, x], 0)
    return info_nce(model, (images, images * 1.1 + 0.1)) + CROSS_ENTROPY(y, model.back(tf.stop_gradient(model.net(x))))


def adamatch(model, data):
    ((source_w, y), (source_s, _)), (target_w, target_s) = data
    sources = tf.shape(source_w)[0]
    both = tf.shape(tf.concat([source_w, source_s], 0))[0]
    logits = model.net(tf.concat([source_w, source_s, target_w, target_s], 0))
    source, target = logits[:both], logits[both:]
    weak, strong = target[: tf.shape(target_w)[0]], target[tf.shape(target_w)[0] :]
    certain = tf.nn.softmax(source[:sources])
    aligned = tf.math.l2_normalize(tf.nn.softmax(weak) * mean(certain) / mean(tf.nn.softmax(weak)), 1)
    mask = tf.cast(tf.reduce_max(aligned, -1) >= 0.9 * mean(tf.reduce_max(certain, -1)), tf.float32)
    each = tf.nn.softmax_cross_entropy_with_logits(tf.stop_gradient(aligned), strong)
    return CROSS_ENTROPY(y, source[:sources]) + CROSS_ENTROPY(y, source[sources:]) + mean(each * mask)


def metric_learning(model, data):
    pair = data[0] if isinstance(data, tuple) else data
    anchors, positives = pair[0], pair[1]
    return CROSS_ENTROPY(tf.range(10), tf.einsum("ae,pe->ap", model.net(anchors), model.net(positives)) / 0.2)


def molecules(model, data):
    x, y = data
    received = keras.ops.segment_sum(
        keras.ops.take(model.net(x["atoms"]), x["pairs"][:, 1], axis=0), x["pairs"][:, 0], num_segments=20
    )
    pooled = keras.ops.segment_sum(received, x["molecule"], num_segments=4)
    return keras.losses.BinaryCrossentropy(from_logits=True)(y, pooled[:, :1])


class Elements(keras.utils.PyDataset):
    def __init__(self, elements):
        super().__init__()
        self.elements = elements

    def __len__(self):
        return len(self.elements)

    def __getitem__(self, index):
        return self.elements[index]


def stacked_pairs():
    return Elements([np.stack([X[i : i + 10], X[i + 10 : i + 20]]) for i in range(5)])


def batched(*parts, size=8):
    return tf.data.Dataset.from_tensor_slices(parts if len(parts) > 1 else parts[0]).batch(size, drop_remainder=True)


def merged_molecules():
    offsets = np.repeat(np.arange(4) * 5, 7)[:, None]
    return Elements(
        [
            (
                {
                    "atoms": X[i : i + 20],
                    "pairs": (RANDOM.integers(0, 5, (28, 2)) + offsets).astype("int32"),
                    "molecule": np.repeat(np.arange(4), 5).astype("int32"),
                },
                (Y[i : i + 4, None] > 1).astype("float32"),
            )
            for i in range(5)
        ]
    )


VIEWS = batched(X, X * 1.1 + 0.1)
STREAMS = tf.data.Dataset.zip((batched(U, size=24), batched(X, Y)))
DOMAINS = tf.data.Dataset.zip(
    (
        tf.data.Dataset.zip((batched(X, Y), batched(X * 0.9, Y))),
        tf.data.Dataset.zip((batched(U, size=24), batched(U * 0.9, size=24))),
    )
)
CASES = {
    "generative/vae": (vae, batched(X), {}),
    "generative/vq_vae": (vq_vae, batched(X), {"quantizes": True}),
    "generative/real_nvp": (real_nvp, batched(X), {}),
    "generative/ddpm": (ddpm, batched(X), {"after": moving_average}),
    "vision/knowledge_distillation": (distillation, batched(X, Y), {}),
    "vision/simsiam": (simsiam, VIEWS, {}),
    "vision/siamese_network": (triplets, batched(X, X * 0.9, X[::-1].copy()), {}),
    "vision/siamese_contrastive": (pairs, batched(X, X[::-1].copy(), Y), {}),
    "vision/semantic_image_clustering (clusters)": (cluster_entropy, batched(X), {}),
    "vision/masked_image_modeling": (masked_image, batched(X), {}),
    "nlp/masked_language_modeling": (masked_language, batched(X, Y), {}),
    "graph/gat_node_classification": (graph_of_the_model, batched(Y % 20, Y), {}),
    "vision/semantic_image_clustering (representation)": (info_nce, VIEWS, {}),
    "nlp/nl_image_search": (info_nce, VIEWS, {}),
    "vision/supervised-contrastive-learning": (supervised_contrastive, batched(X, Y), {}),
    "vision/barlow_twins": (barlow, VIEWS, {}),
    "vision/semisupervised_simclr": (simclr, STREAMS, {}),
    "vision/adamatch": (adamatch, DOMAINS, {}),
    "vision/metric_learning": (metric_learning, stacked_pairs(), {}),
    "graph/mpnn-molecular-graphs": (molecules, merged_molecules(), {}),
}  # fmt: skip


def made(loss, options):
    keras.utils.set_random_seed(1)
    model = Example(loss, **options)
    if model.quantizer is not None:
        model.quantizer.build((None, 4))
    if loss is simclr:
        model.back = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    model.compile(keras.optimizers.SGD(0.05))
    return model


def measured(name):
    loss, data, options = CASES[name]
    plain = made(loss, options)
    start = [weight.numpy() for weight in plain.weights]
    plain.fit(data, epochs=2, verbose=0, shuffle=False)
    target = 24 if data is STREAMS else 8
    found = {}
    for way, micro_batch in (("cut", 9 if data is STREAMS else 3), ("whole", target)):
        model = made(loss, options)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", autobatch.AutobatchWarning)
            history = autobatch.fit(
                model, data, target_batch=target, micro_batch=micro_batch, epochs=2, verbose=0, shuffle=False
            )
        weights = [np.concatenate([np.ravel(weight) for weight in each.weights]) for each in (model, plain)]
        change = weights[1] - np.concatenate([np.ravel(weight) for weight in start])
        found[way] = {
            "difference": float(np.linalg.norm(weights[0] - weights[1]) / np.linalg.norm(change)),
            "micro_batches": history.plan.micro_batches,
            "said": [
                str(each.message).replace(f"{Path(__file__).parent}{os.sep}", "")
                for each in said
                if issubclass(each.category, autobatch.AutobatchWarning)
            ],
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = {}
    for name in CASES:
        results[name] = found = measured(name)
        print(f"{name:52} cut {found['cut']['difference']:.1e}  whole {found['whole']['difference']:.1e}", flush=True)
        for sentence in found["cut"]["said"]:
            print(f"    {sentence}", flush=True)
    if options.output is not None:
        versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
        options.output.write_text(
            json.dumps({"versions": versions, "cases": results}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
