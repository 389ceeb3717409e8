"""Trials in a process of their own: the worker's side.

Started by ``worker/process.py`` as ``python -m autobatch.worker.main REQUEST_FD REPLY_FD``. Nothing here imports
TensorFlow or Keras before the target needs them: the target's file may set what TensorFlow reads when it is imported.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib
import importlib.util
import os
import queue
import resource
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from autobatch.arguments import require_backend
from autobatch.errors import (
    AutobatchError,
    AutobatchWarning,
    CannotBeCutError,
    NoFeasibleBatchError,
    NotApplicableError,
    TargetError,
)
from autobatch.memory import arena, oom
from autobatch.record_codec import decode_record, encode
from autobatch.records import Outcome, TrialRequest, TrialResult, Variant
from autobatch.tracebacks import raised_here, user_traceback
from autobatch.trial.protocol import Trials
from autobatch.types import Model
from autobatch.worker import variants
from autobatch.worker.messages import Message, Ready, pack, unpack
from autobatch.worker.target import call_target, load_target, needed_keras


def main(arguments: list[str]) -> int:
    request_fd, reply_fd = (int(argument) for argument in arguments)
    for descriptor in (request_fd, reply_fd):
        os.set_inheritable(descriptor, False)  # processes that the user's code starts must not hold the pipes open
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent asks with it where a worker hangs
    requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(request_fd, requests), daemon=True).start()

    def reply(message: Message) -> None:
        frame = pack(message)
        try:
            while frame:
                frame = frame[os.write(reply_fd, frame) :]
        except BrokenPipeError:
            _die()

    _serve(requests, reply)
    return 0


def _read_requests(descriptor: int, requests: queue.SimpleQueue[Message]) -> None:
    """Pass on what the parent asks. Once the parent is gone, end this process, even in the middle of a trial."""
    buffer = bytearray()
    while chunk := os.read(descriptor, 1 << 16):
        buffer += chunk
        while (message := unpack(buffer)) is not None:
            requests.put(message)
    _die()


def _die() -> None:
    if os.getpgrp() == os.getpid():  # else the group is not ours to kill
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _serve(requests: queue.SimpleQueue[Message], reply: Callable[[Message], None]) -> None:
    options = requests.get()
    reply({"kind": "loading"})
    # The boundary to the user's code: whatever it raises, sys.exit() and KeyboardInterrupt included, is for the parent.
    try:
        trials, fingerprint, rematerialised, notes = _open(options)
        ready = Ready(
            environment=trials.environment,
            largest_useful=trials.largest_useful,
            fixed_bytes_hint=trials.fixed_bytes_hint,
            model_name=trials.model_name,
            notes=tuple(notes),
            host_uses=tuple(trials.host_uses),
            fingerprint=fingerprint,
            content=trials.content,
            rematerialised=tuple(rematerialised),
            replicas=trials.replicas,
            samples_in_portion=getattr(trials, "samples_in_portion", 1),
            takes_elements_whole=getattr(trials, "takes_elements_whole", False),
        )
        reply({"kind": "ready", "ready": encode(ready)})
    except BaseException as error:  # noqa: BLE001 - see above
        reply(_failure(error, options["target"]))
        return
    while (message := requests.get())["kind"] != "close":
        if message["kind"] == "estimate":
            try:
                found = trials.estimate_sample()
                reply({"kind": "estimate", "estimate": encode(found)})
            except BaseException as error:  # noqa: BLE001 - the same boundary
                reply(_failure(error, options["target"]))
                return
            continue
        request = decode_record(TrialRequest, message["request"], "request")
        try:
            result = trials.run(request)
        except BaseException as error:  # noqa: BLE001 - the same boundary
            diagnosis = oom.diagnose(error)
            if not diagnosis.is_memory:
                reply(_failure(error, options["target"]))
                return
            # Out of memory where the trial did not expect it: the size is answered, but this process is not to be
            # trusted with another.
            detail, requested = diagnosis.detail, diagnosis.requested_bytes
            result = TrialResult(request.micro_batch, Outcome.OUT_OF_MEMORY, requested_bytes=requested, detail=detail)
            reply({"kind": "result", "result": encode(result), "warnings": None, "worker_ends": True})
            return
        whole = request.micro_batch == options["target_batch"]  # one batch differs in nothing
        warned = None if whole else list(trials.warnings)
        reply({"kind": "result", "result": encode(result), "warnings": warned, "worker_ends": False})
    # Trials are not closed: there is nothing to put back in a process that ends here.


def _open(options: Message) -> tuple[Trials, str, list[str], list[str]]:
    """Load the target, call it, and open the trials of what it returns.

    Return the trials, the model's fingerprint, the names of its rematerialised layers, and notes for the report.
    """
    target = options["target"]
    notes: list[str] = []
    with _backend_named(target):
        build = load_target(options, notes)
    _limit_devices(target, options["memory_limit_bytes"])
    variant = decode_record(Variant, options["variant"], "variant")
    precision = variant.precision or options["precision"]
    if precision is not None:
        needed_keras().config.set_dtype_policy(precision)
    with contextlib.ExitStack() as stack:
        if options["strategy"] is not None:
            import tensorflow as tf

            stack.enter_context(tf.distribute.MirroredStrategy().scope())
        with _backend_named(target):
            model, dataset, y, rematerialised = _build(options, variant, build)
    module, _, function = options["opener"].partition(":")
    open_trials = getattr(importlib.import_module(module), function)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AutobatchWarning)
        trials: Trials = open_trials(
            model,
            dataset,
            y,
            target_batch=options["target_batch"],
            memory_limit_bytes=options["memory_limit_bytes"],
            headroom=options["headroom"],
            **({"cannot_be_cut": options["cannot_be_cut"]} if options["cannot_be_cut"] else {}),
        )
    notes += [str(warning.message) for warning in caught if issubclass(warning.category, AutobatchWarning)]
    if variant.precision is not None:
        variants.require_policy(model, variant.precision)
    elif precision not in (None, trials.environment.precision):
        notes.append(f"Precision {precision} was asked for, but {target} sets {trials.environment.precision} itself.")
    return trials, _fingerprint(model), rematerialised, notes


@contextlib.contextmanager
def _backend_named(target: str) -> Iterator[None]:
    """Say which backend was asked of Keras, where what that imports is missing."""
    try:
        yield
    except ImportError as error:
        backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
        try:
            require_backend(backend)
        except ValueError as refused:
            raise TargetError(f"{target}: {refused}") from error
        raise


def _build(options: Message, variant: Variant, build: Callable[[], object]) -> tuple[Any, object, object, list[str]]:
    """Return what the target returns, changed as ``variant`` says, and the names of the rematerialised layers."""
    names: list[str] = []
    if variant.rematerialise:
        (model, dataset, y), names = variants.rematerialised(
            lambda: call_target(options["target"], build), variant.rematerialise
        )
    else:
        model, dataset, y = call_target(options["target"], build)
    if variant.slotless_optimizer:
        variants.take_slots_away(model)
    if variant.jit_compile is not None:
        variants.set_jit(model, variant.jit_compile)
    elif options["jit_compile"] is not None:
        model.jit_compile = options["jit_compile"]
    return model, dataset, y, names


def _fingerprint(model: Model) -> str:
    """Return the model's variables in short: equal for two models that are built alike."""
    variables = [f"{tuple(v.shape)}:{v.dtype}:{v.trainable}" for v in getattr(model, "variables", ())]
    digest = hashlib.sha256("\n".join(variables).encode()).hexdigest()[:8]
    return f"{len(variables)} variables ({digest})"


def _limit_devices(target: str, limit_bytes: int | None) -> None:
    """Set what the environment cannot: the limit of a GPU, and that a failing allocation fails at once."""
    if limit_bytes is not None:
        if not arena.devices_started():
            arena.limit_memory(limit_bytes)
        elif sys.modules["tensorflow"].config.get_visible_devices("GPU"):
            raise TargetError(
                f"{target} starts TensorFlow's devices while its file is imported, before a GPU can be limited. "
                "Make tensors and models inside the function."
            )
    if "tensorflow" in sys.modules:
        arena.without_allocation_wait()


def _failure(error: BaseException, target: str) -> Message:
    """Return the message that reports ``error`` to the parent."""
    if isinstance(error, NoFeasibleBatchError):
        sizes = {"needed_bytes": error.needed_bytes, "limit_bytes": error.limit_bytes}
        return {"kind": "no_feasible_batch", "message": str(error), **sizes}
    if isinstance(error, NotApplicableError):
        return {"kind": "not_applicable", "message": str(error)}
    if isinstance(error, CannotBeCutError):
        return {"kind": "cannot_be_cut", "reason": error.reason}
    diagnosis = oom.diagnose(error)
    if diagnosis.is_memory:
        return {"kind": "memory_error", "message": diagnosis.detail, "requested_bytes": diagnosis.requested_bytes}
    # Raised in autobatch itself: a model or data that it cannot take. Further out it is the user's own error.
    if isinstance(error, (AutobatchError, ValueError, TypeError)) and raised_here(error):
        prefix = "" if isinstance(error, TargetError) else f"{target}: "
        return {"kind": "target_error", "message": prefix + str(error)}
    if isinstance(error, SystemExit):
        message = f"{target} called sys.exit({error.code!r})"
    else:
        message = traceback.format_exception_only(type(error), error)[-1].strip()
    return {"kind": "user_error", "message": message, "traceback": user_traceback(error)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
