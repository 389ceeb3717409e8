"""Models built or compiled in another way, inside a worker, as a :class:`autobatch.records.Variant` asks.

Each function changes what it says, or raises ``NotApplicableError`` where that would change nothing. Keras is imported
when it is first needed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from autobatch.errors import NotApplicableError
from autobatch.types import Layer, Model

_Built = tuple[Any, object, object]  # model, dataset, y


def rematerialised(call: Callable[[], _Built], what: str) -> tuple[_Built, list[str]]:
    """Return what ``call`` returns, made under ``keras.RematScope``, and the names of the layers that it covers.

    The scope's mode "full" covers the model as well, which then fails in a compiled step; see
    :func:`autobatch.seams.rematerialisation.rematerialisable_layers`. So the scope lists layers, and the list is filled
    once they are known: Keras looks for a layer's name in it when the layer is called.
    """
    import keras

    if not hasattr(keras, "RematScope"):
        raise NotApplicableError(f"keras.RematScope is new in Keras 3.9, and this is Keras {keras.__version__}")
    covered = _Names()
    if what == "activations":
        scope = keras.RematScope(mode="activations")
    else:
        scope = keras.RematScope(mode="list_of_layers", layer_names=covered)
    with scope:
        returned = call()

    from autobatch.seams import rematerialisation

    if what == "activations":
        layers = rematerialisation.activated_layers(returned[0])
    else:
        layers = rematerialisation.rematerialisable_layers(returned[0])
    covered.names = list(dict.fromkeys(layer.name for layer in layers))
    if not covered.names:
        raise NotApplicableError(_NO_ACTIVATION if what == "activations" else _NO_LAYER)
    return returned, covered.names


class _Names:
    """Names that are known only later. A list would not do: Keras copies the lists that it keeps in a layer."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __contains__(self, name: object) -> bool:
        return name in self.names


_NO_LAYER = (
    "TensorFlow's recompute_grad takes no keyword arguments in a compiled step, and every layer of the model gets "
    "training or mask as one, or was made before the function was called"
)
_NO_ACTIVATION = "no layer of the model has an activation, or all were made before the function was called"


def take_slots_away(model: Model) -> None:
    """Replace the optimizer by SGD without momentum, with its learning rate, clipping and weight decay."""
    import keras

    from autobatch.seams.optimizers import optimizers_of

    optimizers = optimizers_of(model)
    outer = getattr(model, "optimizer", None)
    if len(optimizers) != 1 or outer is not optimizers[0]:
        raise NotApplicableError(
            f"only a model with one optimizer, model.optimizer, can be tried; it has {len(optimizers)}"
        )
    inner = getattr(outer, "inner_optimizer", outer)
    if type(inner) is keras.optimizers.SGD and not inner.momentum and not inner.use_ema:
        raise NotApplicableError("the optimizer, SGD without momentum, has no slots")
    plain = keras.optimizers.SGD(
        float(inner.learning_rate),
        weight_decay=inner.weight_decay,
        clipnorm=inner.clipnorm,
        clipvalue=inner.clipvalue,
        global_clipnorm=inner.global_clipnorm,
    )
    model.optimizer = plain if outer is inner else keras.optimizers.LossScaleOptimizer(plain)
    del optimizers, outer, inner
    gc.collect()  # slots that were built already


def set_jit(model: Model, jit_compile: bool) -> None:
    """Turn XLA on or off; refuse to turn it on for a model that runs eagerly."""
    if jit_compile and getattr(model, "run_eagerly", False):
        raise NotApplicableError("the model runs eagerly (run_eagerly=True), and XLA compiles only what is traced")
    model.jit_compile = jit_compile


def layers_of_variant(model: Model) -> list[Layer]:
    """Return a model, its layers, their layers, and so on."""
    from autobatch.seams import models

    return models.layers_of(model)


def require_policy(model: Model, policy: str) -> None:
    """Refuse a model if none of its layers took the global policy that was set before it was built."""
    found = sorted({layer.dtype_policy.name for layer in layers_of_variant(model) if layer.variables})
    if found and policy not in found:
        raise NotApplicableError(
            f"the model's layers set their own dtype policy ({', '.join(found)}), so that the global one has no effect"
        )
