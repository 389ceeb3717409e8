"""Steps that apply optimizers more than once: each update is the effective batch's, where it stands in the step."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import updating_models as models
from updating_models import SAMPLES, compare, noise

from autobatch.graphs import parts

pytestmark = pytest.mark.usefixtures("double_precision")

REAL, LATENT = noise()
LABELS = np.random.default_rng(3).integers(0, 4, SAMPLES)
STEPS = {
    "WGAN-GP": (models.PenalisedCritic, REAL, LATENT),
    "WGAN": (models.ClippedCritic, REAL, LATENT),
    "DCGAN": (models.InTurn, REAL, LATENT),
    "shared fakes": (models.SharedFakes, REAL, LATENT),
    "conditional": (models.Conditional, REAL, (LATENT, LABELS)),
    "CycleGAN": (models.Cycle, REAL, REAL[::-1].copy()),
    "actor and critics": (models.ActorAndCritics, *models.transitions()),
    "captions": (models.Captioner, *models.captions()),
}


def options_for(model, **more):
    return lambda: {**({"optimizer": keras.optimizers.SGD(0.1)} if model is models.Captioner else {}), **more}


@pytest.mark.parametrize("kind", STEPS)
def test_weights_and_logs_are_those_of_plain_keras(kind):
    model, x, y = STEPS[kind]
    _, history = compare(model, x, y, options=options_for(model))
    assert history.report.warnings == ()


@pytest.mark.parametrize("kind", ["WGAN-GP", "shared fakes"])
def test_even_micro_batches_under_xla(kind):
    model, x, y = STEPS[kind]
    compare(model, x, y, micro_batch=12, options=options_for(model, jit_compile=True))


def test_what_is_too_large_to_be_kept_is_computed_again(monkeypatch):
    kept = []
    own = parts.Parts._give

    def give(self, level, tensor, *, once):
        kept.append((tensor, once))
        own(self, level, tensor, once=once)

    monkeypatch.setattr(parts.Parts, "_give", give)
    model, x, y = STEPS["shared fakes"]
    compare(model, x, y, epochs=1)
    assert any(tensor.shape.rank for tensor, _ in kept), "what the generator's gradient needs is small here"
    kept.clear()
    monkeypatch.setattr(parts, "MOST_BYTES", 0)
    compare(model, x, y, epochs=1)
    assert not [tensor for tensor, once in kept if tensor.shape.rank and not once]


def test_a_second_training_traces_nothing_and_goes_on_from_the_first(monkeypatch):
    traced = []
    own = models.PenalisedCritic.train_step
    monkeypatch.setattr(
        models.PenalisedCritic, "train_step", lambda model, data: (traced.append(1), own(model, data))[1]
    )
    counts = []
    compare(models.PenalisedCritic, REAL, LATENT, fits=3, behind=lambda: counts.append(len(traced)))
    plain, ours = counts[:3], counts[3:]
    assert plain == [2, 4, 6], "plain Keras runs eagerly: two epochs of one step in each training"
    assert ours[0] > plain[-1]
    assert ours[0] == ours[1] == ours[2]


def test_a_smaller_last_batch():
    real, latent = noise(samples=40)
    compare(models.ClippedCritic, real, latent)


def test_one_micro_batch_is_kerass_own_step():
    compare(models.PenalisedCritic, REAL, LATENT, micro_batch=SAMPLES)


def test_optimizers_with_slots_count_as_many_updates_as_in_keras():
    def options():
        return {"optimizers": (keras.optimizers.SGD(0.05, momentum=0.9), keras.optimizers.SGD(0.05, nesterov=True))}

    model, _ = compare(models.ClippedCritic, REAL, LATENT, options=options)
    assert int(model.c_optimizer.iterations) == 2 * models.STEPS
    assert int(model.g_optimizer.iterations) == 2
