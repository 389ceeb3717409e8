"""Traced steps of a model, kept for its next training on data alike, as Keras keeps its own functions.

They are kept with what ``compile`` makes anew. So they live as long as Keras's functions: until the model is compiled
again, or is no longer used. They hold no memory for gradients meanwhile.

As in Keras, a change of ``trainable`` has no effect on what is traced before ``compile``, or
``make_train_function(force=True)``. What is traced later for the same compilation is traced in the state of the first
training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from autobatch.seams import models
from autobatch.seams.trainable import TrainableState
from autobatch.step.compiled_step import CompiledStep
from autobatch.types import ElementSpec, Model

MOST_KEPT = 4
"""Most steps that are kept of a model: each is for data of another structure or another effective batch."""

StepT = TypeVar("StepT", bound=CompiledStep)


class KeptSteps:
    """Steps of one compilation of a model, and the state that its first training was traced in."""

    def __init__(self) -> None:
        self._steps: dict[Any, CompiledStep] = {}
        self._trained_as: TrainableState | None = None
        self._train_function: Any = None

    def begin_training(self, model: Model) -> None:
        """Note that the model is about to be trained; the first training fixes what is trainable."""
        self._forget_what_was_made_anew(model)
        self._trained_as = self._state_of(model)

    def borrow(self, model: Model, key: Any, make: Callable[[], StepT]) -> Any:
        """Return the step that is kept under a key, or a new one; it is not lent again before :meth:`give_back`."""
        self._forget_what_was_made_anew(model)
        state = self._state_of(model)
        step = self._steps.pop(key, None)
        if step is None or step.trained_as is None or not step.trained_as.agrees(state):
            step = make()
            step.trained_as = state
        step.kept_under = self, key
        return step

    def _state_of(self, model: Model) -> TrainableState:
        return self._trained_as or TrainableState.traced_by_keras(model) or TrainableState.of_now(model)

    def give_back(self, step: CompiledStep) -> None:
        """Keep a step that was borrowed; it holds no memory from now on."""
        assert step.kept_under is not None
        key = step.kept_under[1]
        step.on_traced = step.on_optimizer_found = _nothing  # those of the training that has ended hold its data
        if step.trained_as is not None:
            step.trained_as = step.trained_as.joined(step.model)
            if self._trained_as is not None:
                self._trained_as = step.trained_as
        self.note_train_function(step.model)
        self._steps[key] = step
        while len(self._steps) > MOST_KEPT:
            del self._steps[next(iter(self._steps))]

    def note_train_function(self, model: Model) -> None:
        """Note the train function that a training has left, so that another one is seen to be newer."""
        self._train_function = getattr(model, "train_function", None)

    def forget(self) -> None:
        """Forget all steps and the state of the first training."""
        self._steps, self._trained_as = {}, None

    def _forget_what_was_made_anew(self, model: Model) -> None:
        """Forget everything if the user has had Keras's train function made anew since."""
        function, before = getattr(model, "train_function", None), self._train_function
        if function is not before and (before is not None or not models.is_traced(function)):
            self.forget()
        self._train_function = function


def _nothing() -> None:
    pass


def kept_steps(model: Model) -> KeptSteps | None:
    """Return the steps that are kept of a model; None for one that is not compiled by Keras, or runs eagerly."""
    if model.run_eagerly:
        return None
    kept: KeptSteps | None = models.kept_with_compilation(model, "_autobatch_steps", KeptSteps)
    return kept


def begin_training(model: Model) -> None:
    """Note that a model is about to be trained: see :meth:`KeptSteps.begin_training`."""
    kept = kept_steps(model)
    if kept is not None:
        kept.begin_training(model)


def forget_steps(model: Model) -> None:
    """Forget the steps of a model whose functions are made anew, so that what is trainable now counts."""
    kept = kept_steps(model)
    if kept is not None:
        kept.forget()


def borrow_step(model: Model, element_spec: ElementSpec, sizes: Any, make: Callable[[], StepT]) -> StepT:
    """Return a step for data of ``element_spec``: one that an earlier call has given back, or a new one.

    ``sizes`` are what else a step is made for.
    """
    kept = kept_steps(model)
    if kept is None:
        return make()
    key = repr(element_spec), sizes, bool(model.jit_compile)
    step: StepT = kept.borrow(model, key, make)
    return step


def give_back(step: CompiledStep) -> None:
    """Let go of a step's memory, and keep its traces if they can be used again."""
    if step.kept_under is None or not step.rest():
        step.release_accumulators()
        kept = kept_steps(step.model)
        if kept is not None:
            kept.note_train_function(step.model)
    else:
        step.kept_under[0].give_back(step)
