"""One device and several replicas offer the same, and a model is asked once which of them it trains on."""

from __future__ import annotations

import inspect

import keras
import pytest
import tensorflow as tf
from models import arrays, classifier

import autobatch
from autobatch.data import fit_data
from autobatch.records import Plan
from autobatch.recovery.transaction import Transaction
from autobatch.replicas import devices as devices_module
from autobatch.replicas.agreement import SingleProcess
from autobatch.replicas.chief_state import FromTheChief
from autobatch.replicas.devices import Devices, OneDevice, Replicas, devices_of_model, open_training, require_one_device
from autobatch.replicas.resume import PlanBackup
from autobatch.replicas.transaction import ReplicatedTransaction
from autobatch.replicas.trials import ReplicatedTrials
from autobatch.seams import strategies
from autobatch.sizing.reports import unsearched
from autobatch.trial.live_trials import LiveTrials

PLAN = Plan(4, 2, 8)
METHODS = sorted(name for name in vars(Devices) if not name.startswith("_"))


@pytest.fixture(params=[OneDevice, Replicas])
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    if kind is OneDevice:
        return classifier()
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        return classifier()


def test_both_have_the_methods_of_the_protocol(kind):
    assert METHODS == ["callbacks", "during_fit", "gather", "open_transaction", "open_trials", "processes"]
    for name in METHODS:
        wanted, found = (inspect.signature(getattr(owner, name)).parameters for owner in (Devices, kind))
        assert list(found.values()) == list(wanted.values()), name


def test_a_model_is_asked_what_it_trains_on(kind, model):
    assert type(devices_of_model(model)) is kind


def test_trials_and_the_transaction_over_their_step(kind, model):
    devices = devices_of_model(model)
    batches, _ = fit_data.prepare_data(model, *arrays(samples=32), target_batch=16, options={"shuffle": False})
    trials = devices.open_trials(model, batches, target_batch=16, user_limit_bytes=None, headroom=0.0)
    assert type(trials) is (LiveTrials if kind is OneDevice else ReplicatedTrials)
    report = unsearched(trials, 4, 16)
    transaction = open_training(devices, trials, report, user_limit_bytes=None, begin_at=2)
    assert type(transaction) is (Transaction if kind is OneDevice else ReplicatedTransaction)
    assert transaction.policy.micro_batch == 2
    with devices.during_fit(model, transaction):
        assert strategies.strategy_of(model) is None  # as Keras's fit sees it
    assert (strategies.strategy_of(model) is None) is (kind is OneDevice)
    trials.close()


def test_the_choice_is_made_once_in_a_fit(kind, model, monkeypatch):
    asked = []

    def ask(model, timeout_seconds):
        asked.append(timeout_seconds)
        return devices_of_model(model, timeout_seconds)

    monkeypatch.setattr(devices_module, "devices_of_model", ask)
    history = autobatch.fit(model, *arrays(samples=32), target_batch=16, micro_batch=4, worker_timeout=9.0, verbose=0)
    assert history.plan.accumulation_steps == 4
    assert asked == [9.0]


def test_what_one_process_gathers(kind, model):
    assert devices_of_model(model).gather([1.0, 2.0], "numbers").tolist() == [[1.0, 2.0]]


def test_the_plan_is_kept_where_there_is_a_backup(kind, model, tmp_path):
    devices = devices_of_model(model)
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    assert devices.callbacks(None, PLAN, None) == []
    assert [type(each) for each in devices.callbacks([backup], PLAN, None)] == [PlanBackup]


@pytest.mark.parametrize("index", [0, 1])
def test_of_two_workers_the_chief_writes_and_both_begin_with_its_state(index, tmp_path):
    agreement = SingleProcess()
    agreement.index, agreement.count = index, 2
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    added = Replicas(None, agreement).callbacks([backup], PLAN, None)
    assert [type(each) for each in added] == [PlanBackup, FromTheChief][index:]
    assert backup.delete_checkpoint is (index == 0)


def test_a_wrapped_step_has_one_device():
    assert isinstance(require_one_device(classifier()), OneDevice)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = classifier()
        with pytest.raises(ValueError, match="wrap_step works on one device"):
            require_one_device(None)
    with pytest.raises(ValueError, match=f"Received: '{model.name}', made under a strategy"):
        require_one_device(model)
