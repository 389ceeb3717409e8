"""What is private in tf.distribute and in Keras's use of it is where :mod:`autobatch.seams.strategies` says."""

from __future__ import annotations

import keras
import optional
import pytest
import tensorflow as tf
from keras.src.losses import loss as loss_module
from models import arrays, classifier
from tensorflow.python.eager import context

import autobatch
from autobatch.replicas.agreement import SingleProcess, agreement_for
from autobatch.replicas.resume import FILE_NAME
from autobatch.seams import losses, optimizers, strategies


@pytest.fixture(scope="module")
def mirrored():
    optional.several_devices()
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        return strategy, classifier()


def test_a_model_and_its_optimizer_know_their_strategy(mirrored):
    strategy, model = mirrored
    assert strategies.strategy_of(model) is strategy
    assert model.optimizer._distribution_strategy is strategy
    assert strategies.strategy_of(classifier()) is None
    strategies.require_supported_strategy(model)
    assert strategies.devices_of(strategy) == ("CPU:0",)
    assert strategies.worker_of(strategy) == (0, 1)
    assert isinstance(agreement_for(strategy), SingleProcess)


def test_what_is_replaced_is_there_and_is_put_back(mirrored):
    _, model = mirrored
    scale = loss_module.scale_loss_for_distribution
    with losses.losses_unscaled():
        assert loss_module.scale_loss_for_distribution is not scale
    assert loss_module.scale_loss_for_distribution is scale
    assert callable(model.optimizer._all_reduce_sum_gradients)
    with optimizers.gradients_already_reduced([model.optimizer]):
        assert model.optimizer._all_reduce_sum_gradients([1]) == [1]
    assert "_all_reduce_sum_gradients" not in model.optimizer.__dict__
    with strategies.keras_on_one_device(model, lambda: {"loss": 3.0}):
        assert model._distribute_strategy is None
        assert model.get_metrics_result() == {"loss": 3.0}
    assert strategies.strategy_of(model) is not None
    assert "get_metrics_result" not in model.__dict__


def test_a_copy_knows_the_variable_that_it_is_a_copy_of(mirrored):
    _, model = mirrored
    for variable in model.trainable_variables[0].value, model.metrics[0].variables[0].value:
        (copy,) = variable.values
        assert (
            getattr(copy, "_distributed_container", getattr(copy.handle, "_distributed_container", None))() is variable
        )
        assert strategies.first_copy_of(copy) is copy
    alone = tf.Variable(1.0)
    assert strategies.first_copy_of(alone) is alone


def test_tensorflows_context_has_what_watches_the_workers():
    for name in ("abort_collective_ops", "check_collective_ops_peer_health"):
        assert callable(getattr(context.context(), name))
    tf.random.set_seed(5)
    assert strategies.global_seed() == 5


def test_backups_are_written_by_one_method(tmp_path):
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    assert callable(backup._save_model)
    strategies.never_write(backup)
    backup.on_epoch_end(0)
    backup.on_train_end()
    assert not (tmp_path / "backup").exists()


@pytest.mark.parametrize("value", [0, -1, float("inf")])
def test_a_timeout_must_be_some_seconds(value):
    with pytest.raises(ValueError, match="worker_timeout must be a number of seconds above 0"):
        autobatch.fit(classifier(), *arrays(), target_batch=16, worker_timeout=value)


def test_the_plan_is_kept_beside_a_backup_and_spares_the_next_search(tmp_path):
    x, y = arrays()

    class Die(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def backup():
        return keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))

    options = {"target_batch": 16, "epochs": 2, "verbose": 0, "shuffle": False}
    with pytest.raises(KeyboardInterrupt):
        autobatch.fit(classifier(), x, y, micro_batch=6, callbacks=[backup(), Die()], **options)
    assert (tmp_path / "backup" / FILE_NAME).exists()
    history = autobatch.fit(classifier(), x, y, callbacks=[backup()], **options)
    assert history.epoch == [1]
    assert history.plan.micro_batch == 6
    assert history.report.trials == ()
    assert "kept beside the backup" in history.report.stopped_because
    assert not (tmp_path / "backup").exists()
