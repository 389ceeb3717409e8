"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from models import arrays, classifier

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_there_are_two_commands():
    assert len(blocks("sh")) == 2


@pytest.mark.parametrize("number", range(3))
def test_python(number):
    x, y = arrays(samples=512)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(256)
    model, optimizer = classifier(), keras.optimizers.Adam()
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train_step(batch):
        with tf.GradientTape() as tape:
            loss = loss_of(batch[1], model(batch[0], training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    names = {
        "tf": tf,
        "build": classifier,
        "loss": loss_of,
        "x": x,
        "y": y,
        "model": model,
        "dataset": dataset,
        "validation": (x, y),
        "train_step": train_step,
        "optimizer": optimizer,
    }
    source = blocks("python")[number]
    exec("import autobatch\n" + source, names)
    if "strategy" in names:
        assert names["history"].plan.effective_batch == 512, "all there are"
    elif "history" in names:
        assert names["history"].plan.effective_batch == 256
    else:
        assert float(names["loss"]) > 0
