"""Let KerasTuner choose hyperparameters at one effective batch, whatever each model needs.

A search by KerasTuner makes models of different sizes. Here each is trained at an effective batch of 256 in 80 MiB.
``HyperModel.fit`` returns what ``autobatch.fit`` returns. The second model is as large as the first, so that its plan
is remembered: one trial confirms it.

    pip install autobatch keras-tuner tensorboard scikit-learn
    python keras_tuner_search.py
"""

from __future__ import annotations

import tempfile

import autobatch

autobatch.limit_memory("80MiB")  # before TensorFlow starts

import keras  # noqa: E402
import keras_tuner  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

digits = load_digits()
images = np.kron(digits.images[..., None] / 16, np.ones((1, 4, 4, 1))).astype("float32")  # 32 x 32 pixels
train, validation = (images[:1280], digits.target[:1280]), (images[1280:1536], digits.target[1280:1536])


class Digits(keras_tuner.HyperModel):
    def build(self, hp):
        model = keras.Sequential([keras.Input((32, 32, 1))])
        model.add(keras.layers.Conv2D(hp.Choice("filters", [16, 32]), 3, padding="same", activation="relu"))
        model.add(keras.layers.Conv2D(16, 3, padding="same", activation="relu"))
        model.add(keras.layers.MaxPooling2D(4))
        model.add(keras.layers.Flatten())
        model.add(keras.layers.Dense(10, activation="softmax"))
        rate = hp.Choice("learning_rate", [0.01, 0.003])
        model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    def fit(self, hp, model, *data, **options):
        history = autobatch.fit(model, *data, target_batch=256, **options)
        print(f"{hp.values}: micro-batch {history.plan.micro_batch} ({history.report.stopped_because})")
        return history


with tempfile.TemporaryDirectory() as folder:
    tuner = keras_tuner.GridSearch(
        Digits(), objective="val_accuracy", max_trials=3, directory=folder, project_name="digits"
    )
    tuner.search(*train, validation_data=validation, epochs=1, verbose=0)
    best = tuner.get_best_hyperparameters()[0]
print("best:", best.values)
