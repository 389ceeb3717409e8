"""Opening of trials on a live model: checks of what was given, and one reading of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autobatch import arguments
from autobatch.errors import warn

if TYPE_CHECKING:
    import keras

    from autobatch.data.effective_batches import EffectiveBatches
    from autobatch.trial.live_trials import LiveTrials


SAMPLE_ROWS = 32
"""Number of samples taken from the data where there is no target; trials repeat them as needed."""


def open_trials(
    model: keras.Model,
    dataset: Any,
    y: Any = None,
    *,
    target_batch: int | None,
    memory_limit_bytes: int | None,
    headroom: float,
    cannot_be_cut: str = "",
) -> LiveTrials:
    """Make trials on a live model; :meth:`LiveTrials.close` puts everything back. See :func:`tune`.

    ``cannot_be_cut`` is a reason to take each element whole, which earlier trials have found.
    """
    require_model(model)

    from autobatch.data import fit_data, own_fit
    from autobatch.replicas.devices import devices_of_model
    from autobatch.seams import fitting
    from autobatch.step import supported

    fit_data.require_repeatable(dataset)
    rows = SAMPLE_ROWS if target_batch is None else target_batch
    options: dict[str, Any] = {"shuffle": False}
    if fitting.overrides_fit(model):
        given = own_fit.handed_to_keras(model, dataset, y, target_batch=rows)
        dataset, y = given.get("x"), given.get("y")
        kept = ("sample_weight", "class_weight", fit_data.AS_THEY_COME)
        options |= {name: given[name] for name in kept if name in given}
    require_compiled(model)
    supported.require_supported(model)
    devices = devices_of_model(model)
    batches, _ = fit_data.prepare_data(
        model, dataset, y, target_batch=rows, options=options, only_look=True, rounds=target_batch is None
    )
    if cannot_be_cut:
        batches.keep_whole(cannot_be_cut)
    batches.say_how_they_are_cut()
    effective = None if target_batch is None else effective_batch(batches)
    return devices.open_trials(
        model, batches, target_batch=effective, user_limit_bytes=memory_limit_bytes, headroom=headroom
    )


def require_model(model: Any) -> None:
    """Refuse anything but a Keras 3 model on the TensorFlow backend."""
    arguments.require_keras_3(model)
    if not hasattr(model, "train_step") or not hasattr(model, "fit"):
        raise TypeError(f"model must be a Keras model. Received: {model!r} (of type {type(model).__name__})")


def require_compiled(model: Any) -> None:
    """Refuse a Keras model that is not compiled."""
    if not getattr(model, "compiled", False):
        raise ValueError(
            "The model is not compiled: call model.compile(optimizer, loss) first. "
            f"Received: {getattr(model, 'name', model)!r}"
        )


def effective_batch(batches: EffectiveBatches) -> int:
    """Return the target of ``batches``; if there are fewer samples, warn and return their number."""
    target, limit = batches.target_batch, batches.sample_limit
    if limit is None or limit >= target:
        return target
    each = batches.structure.samples_in_portion
    warn(
        f"target_batch={target * each} is larger than the data set, which has {limit * each} samples: there will be "
        f"one update an epoch, over {limit * each} samples.",
    )
    return limit
