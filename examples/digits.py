"""Train a convolutional network on handwritten digits at a batch of 256 that does not fit in its memory.

The process is limited to 512 MiB. A plain ``model.fit(..., batch_size=256)`` runs out of it; ``autobatch.fit`` finds
the micro-batch that fits and is fastest, and accumulates gradients to an update over 256 samples.

Run it: ``python examples/digits.py`` (needs ``pip install "autobatch[examples]"``). For the sizing report alone:
``autobatch report examples/digits.py:build --target-batch 256 --memory-limit 512MiB``.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import autobatch

TARGET_BATCH = 256


def load():
    """Scikit-learn's 1,797 handwritten digits, 8 x 8, magnified to 40 x 40: train and validation parts."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype("float32")
    images = np.kron(images, np.ones((1, 5, 5, 1), "float32"))
    return train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)


def build_model():
    """A small convolutional network; training holds about 2 MiB of activations for each sample."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((40, 40, 1))], name="digits")
    for filters, strides in [(32, 1), (32, 1), (32, 1), (32, 4)]:
        model.add(layers.Conv2D(filters, 3, strides=strides, padding="same", kernel_initializer="he_normal"))
        model.add(layers.LayerNormalization())
        model.add(layers.Activation("relu"))
    model.add(layers.Flatten())
    model.add(layers.Dense(10))
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def build():
    """What ``autobatch report`` asks for: the model and its data."""
    train_images, _, train_labels, _ = load()
    return build_model(), (train_images, train_labels)


def main():
    autobatch.limit_memory("512MiB")
    train_images, test_images, train_labels, test_labels = load()
    history = autobatch.fit(
        build_model(),
        train_images,
        train_labels,
        target_batch=TARGET_BATCH,
        epochs=8,
        validation_data=(test_images, test_labels),
        verbose=2,
    )
    print(history.report)
    print(history.plan)
    print(f"validation accuracy: {history.history['val_accuracy'][-1]:.4f}")
    return history


if __name__ == "__main__":
    main()
