"""A saved model as the target of ``autobatch report``: what data are made for it, and one report of one."""

import keras
import pytest
from keras import layers

from autobatch.cli import main
from autobatch.errors import TargetError
from autobatch.worker.keras_file import model_and_data


def saved(folder, model, **compiled):
    path = str(folder / "model.keras")
    if compiled:
        model.compile(**compiled)
    model.save(path)
    return path


def loaded(path, shape=None):
    notes = []
    model, dataset = model_and_data(path, shape, 5, notes)
    x, y = next(iter(dataset.batch(3)))
    assert len(list(dataset)) == 5
    model.fit(dataset.batch(3), verbose=0)  # the data are right if it trains
    return model, x, y, notes


def test_an_image_classifier(tmp_path):
    model = keras.Sequential([keras.Input((None, None, 3)), layers.GlobalAveragePooling2D(), layers.Dense(4)])
    path = saved(tmp_path, model, optimizer="sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model, x, y, notes = loaded(path, (8, 8, 3))
    assert (x.shape, x.dtype.name, y.shape, y.dtype.name) == ((3, 8, 8, 3), "float32", (3,), "int32")
    assert type(model.optimizer) is keras.optimizers.SGD
    assert notes == []
    with pytest.raises(
        TargetError, match=r"leaves dimensions of an input open, \(\?, \?, 3\); --input gives it a shape"
    ):
        loaded(path)
    with pytest.raises(TargetError, match=r"takes inputs of \(\?, \?, 3\)\. Received: --input 8,8,1"):
        loaded(path, (8, 8, 1))
    with pytest.raises(TargetError, match=r"takes inputs of \(\?, \?, 3\)\. Received: --input 8"):
        loaded(path, (8,))


def test_tokens_with_a_target_for_each(tmp_path):
    model = keras.Sequential([keras.Input((None,), dtype="int32"), layers.Embedding(9, 4), layers.Dense(9)])
    path = saved(tmp_path, model, optimizer="adam", loss="sparse_categorical_crossentropy")
    _, x, y, _ = loaded(path, (6,))
    assert (x.shape, x.dtype.name, y.shape) == ((3, 6), "int32", (3, 6))


def test_several_inputs_and_outputs_without_a_compile_configuration(tmp_path):
    inputs = {"image": keras.Input((4, 4, 1), name="image"), "number": keras.Input((2,), name="number")}
    merged = layers.concatenate([layers.Flatten()(inputs["image"]), inputs["number"]])
    model = keras.Model(inputs, {"a": layers.Dense(3, name="a")(merged), "b": layers.Dense(1, name="b")(merged)})
    model, x, y, notes = loaded(saved(tmp_path, model))
    assert {name: value.shape for name, value in x.items()} == {"image": (3, 4, 4, 1), "number": (3, 2)}
    assert {name: value.shape for name, value in y.items()} == {"a": (3, 3), "b": (3, 1)}
    assert notes == [
        f"{tmp_path}/model.keras was saved without its compile configuration: sized with Adam and mean squared error."
    ]


def test_a_loss_for_each_output(tmp_path):
    inputs = keras.Input((5,))
    model = keras.Model(inputs, [layers.Dense(3)(inputs), layers.Dense(2)(inputs)])
    _, _, y, _ = loaded(saved(tmp_path, model, optimizer="sgd", loss=["sparse_categorical_crossentropy", "mse"]))
    assert [value.shape for value in y] == [(3,), (3, 2)]


def test_losses_are_found_by_the_names_of_outputs(tmp_path):
    inputs = keras.Input((5,))
    listed = [layers.Dense(3, name="b")(inputs), layers.Dense(2, name="a")(inputs)]
    losses = {"a": "mse", "b": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    _, _, y, _ = loaded(saved(tmp_path, keras.Model(inputs, listed), optimizer="sgd", loss=losses))
    assert [value.shape for value in y] == [(3,), (3, 2)]
    named = keras.Model(inputs, {"w": layers.Dense(3)(inputs), "c": layers.Dense(2)(inputs)})
    losses = {"w": "sparse_categorical_crossentropy", "c": "mse"}
    _, _, y, _ = loaded(saved(tmp_path, named, optimizer="sgd", loss=losses))
    assert {name: value.shape for name, value in y.items()} == {"w": (3,), "c": (3, 2)}
    one = [None, "sparse_categorical_crossentropy"]
    _, _, y, _ = loaded(saved(tmp_path, keras.Model(inputs, listed), optimizer="sgd", loss=one))
    assert [value.shape for value in y] == [(3, 3), (3,)]


def test_a_model_is_sized_without_a_compile_configuration_that_cannot_be_loaded(tmp_path):
    @keras.saving.register_keras_serializable("tests")
    def lost(y, outputs):
        return keras.losses.mse(y, outputs)

    path = saved(tmp_path, keras.Sequential([keras.Input((5,)), layers.Dense(3)]), optimizer="sgd", loss=lost)
    del keras.saving.get_custom_objects()["tests>lost"]
    model, _, _, notes = loaded(path)
    assert model.loss == "mse"
    assert "is sized with Adam and mean squared error: " in notes[0]


@keras.saving.register_keras_serializable("tests")
class Own(layers.Layer):
    def call(self, inputs):
        return inputs


def test_what_cannot_be_loaded(tmp_path):
    (tmp_path / "model.keras").write_bytes(b"not a model")
    with pytest.raises(TargetError, match="cannot be loaded: .*Load it in a function of a Python file"):
        loaded(str(tmp_path / "model.keras"))


@pytest.mark.slow
def test_a_report_of_a_file(tmp_path, capfd):
    own = saved(tmp_path, keras.Sequential([keras.Input((3,)), Own(), layers.Dense(1)]), optimizer="sgd", loss="mse")
    assert main(["report", own]) == 2
    assert "cannot be loaded" in capfd.readouterr().err
    model = keras.Sequential([keras.Input((None, 3)), layers.GlobalAveragePooling1D(), layers.Dense(1)])
    path = saved(tmp_path, model)
    report = tmp_path / "report.md"
    common = ["report", path, "--input", "16,3", "--target-batch", "8", "--max-trials", "1", "--no-cache"]
    assert main([*common, "--format", "markdown", "--output", str(report)]) == 0
    text = report.read_text("utf-8")
    assert "- **Plan**: effective batch 8" in text
    assert "model.keras was saved without its compile configuration" in text
    assert main([*common[:2], "--format", "json"]) == 2
    assert "leaves dimensions of an input open" in capfd.readouterr().err
    assert main(["report", str(tmp_path / "absent.keras")]) == 2
    assert "does not exist" in capfd.readouterr().err
