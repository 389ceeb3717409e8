"""Trials in a process of their own: the worker's side.

Started by `worker.py` as ``python -m autobatch.trial.worker_main REQUEST_FD REPLY_FD``. Nothing here imports TensorFlow
or Keras before the target needs them: its file may set what TensorFlow reads when it is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import faulthandler
import hashlib
import importlib
import importlib.util
import inspect
import os
import queue
import resource
import signal
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from autobatch.errors import (
    AutobatchError,
    AutobatchWarning,
    NoFeasibleBatchError,
    NotApplicableError,
    TargetError,
)
from autobatch.memory import arena, oom
from autobatch.records import Outcome, TrialRequest, TrialResult, Variant
from autobatch.trial import variants
from autobatch.trial.protocol import Trials
from autobatch.trial.worker_process import Message, pack, pack_result, unpack

_OWN_CODE = str(Path(__file__).resolve().parents[1]) + os.sep
_LIBRARIES = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)

# A synthetic data set is as large as anyone's effective batch; it is one sample repeated and takes no memory.
_SYNTHETIC_SAMPLES = 1 << 16


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
    """Pass on what the parent asks; when the parent is gone, so are we, even in the middle of a trial."""
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
        reply(
            {
                "kind": "ready",
                "environment": dataclasses.asdict(trials.environment),
                "largest_useful": trials.largest_useful,
                "fixed_bytes_hint": trials.fixed_bytes_hint,
                "model_name": trials.model_name,
                "warnings": [*trials.warnings, *notes],
                "host_uses": [[use.name, use.held_bytes] for use in trials.host_uses],
                "fingerprint": fingerprint,
                "content": trials.content,
                "rematerialised": rematerialised,
                "replicas": trials.replicas,
            }
        )
    except BaseException as error:  # noqa: BLE001 - see above
        reply(_failure(error, options["target"]))
        return
    while (message := requests.get())["kind"] != "close":
        if message["kind"] == "estimate":
            try:
                found = trials.estimate_sample()
                reply({"kind": "estimate", "estimate": None if found is None else dataclasses.asdict(found)})
            except BaseException as error:  # noqa: BLE001 - the same boundary
                reply(_failure(error, options["target"]))
                return
            continue
        request = TrialRequest(message["micro_batch"], message["timed_steps"], message["record_allocations"])
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
            reply({"kind": "result", "result": pack_result(result), "worker_ends": True})
            return
        reply({"kind": "result", "result": pack_result(result), "worker_ends": False})
    # Trials are not closed: there is nothing to put back in a process that ends here.


def _open(options: Message) -> tuple[Trials, str, list[str], list[str]]:
    """Load the target, call it, and open the trials of what it returns; with what `_serve` tells of them."""
    target = options["target"]
    notes: list[str] = []
    build = _load(options)
    _limit_devices(target, options["memory_limit_bytes"])
    variant = Variant(**options["variant"])
    precision = variant.precision or options["precision"]
    if precision is not None:
        _keras().config.set_dtype_policy(precision)
    with contextlib.ExitStack() as stack:
        if options["strategy"] is not None:
            import tensorflow as tf

            stack.enter_context(tf.distribute.MirroredStrategy().scope())
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
        )
    notes += [str(warning.message) for warning in caught if issubclass(warning.category, AutobatchWarning)]
    if variant.precision is not None:
        variants.require_policy(model, variant.precision)
    elif precision not in (None, trials.environment.precision):
        notes.append(f"Precision {precision} was asked for, but {target} sets {trials.environment.precision} itself.")
    return trials, _fingerprint(model), rematerialised, notes


def _build(options: Message, variant: Variant, build: Callable[[], object]) -> tuple[Any, object, object, list[str]]:
    """What the target returns, changed as the variant says, and the names of the layers that are rematerialised."""
    names: list[str] = []
    if variant.rematerialise:
        (model, dataset, y), names = variants.rematerialised(
            lambda: _call(options["target"], build), variant.rematerialise
        )
    else:
        model, dataset, y = _call(options["target"], build)
    if variant.slotless_optimizer:
        variants.take_slots_away(model)
    if variant.jit_compile is not None:
        variants.set_jit(model, variant.jit_compile)
    elif options["jit_compile"] is not None:
        model.jit_compile = options["jit_compile"]
    return model, dataset, y, names


def _fingerprint(model: Any) -> str:
    """The model's variables in short: equal for two models that are built alike."""
    variables = [f"{tuple(v.shape)}:{v.dtype}:{v.trainable}" for v in getattr(model, "variables", ())]
    digest = hashlib.sha256("\n".join(variables).encode()).hexdigest()[:8]
    return f"{len(variables)} variables ({digest})"


def _limit_devices(target: str, limit_bytes: int | None) -> None:
    """Set what the environment cannot: the limit of a GPU, and that a failed allocation fails at once."""
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


def _load(options: Message) -> Callable[[], object]:
    """The function that the target names."""
    target: str = options["target"]
    place, _, name = target.rpartition(":")
    if place == "keras":
        return _keras_application(name, tuple(options["input_shape"]), options["classes"], options["target_batch"])
    sys.argv = [place]  # a file that reads its arguments must not meet ours
    module = _import_file(Path(place)) if place.endswith(".py") or os.sep in place else _import_module(place, target)
    try:
        function = getattr(module, name)
    except AttributeError:
        raise TargetError(f"{place} has no function {name!r}.{_did_you_mean(name, vars(module))}") from None
    if not callable(function):
        raise TargetError(f"{target} is not a function. Received: an object of type {type(function).__name__}")
    # Builtins and some classes tell no signature.
    with contextlib.suppress(ValueError, TypeError):
        signature = inspect.signature(function)
        needed = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind in _NEEDED_KINDS]
        if needed:
            raise TargetError(f"{target} must be callable without arguments. It asks for: {', '.join(needed)}")
    return function  # type: ignore[no-any-return]


_NEEDED_KINDS = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    sys.path.insert(0, str(path.parent))
    # Known by its own name, so that objects of its classes can be pickled; but a file called json.py must not become
    # everyone's json.
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    name = f"autobatch_target_{path.stem}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except OSError as error:
        if error.filename is not None and Path(str(error.filename)) == path:
            raise TargetError(f"{path} cannot be read: {error.strerror}") from error
        raise
    return module


def _import_module(name: str, target: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise TargetError(f"There is no module {error.name!r} for the target {target}.") from None
        raise


def _keras_application(
    name: str, input_shape: tuple[int, ...], classes: int, target_batch: int | None
) -> Callable[[], object]:
    """A function that builds a model of keras.applications with random weights, and synthetic data for it."""
    keras = _keras()
    known = {n: f for n, f in vars(keras.applications).items() if n[:1].isupper() and callable(f)}
    if name not in known:
        raise TargetError(f"keras.applications has no {name!r}.{_did_you_mean(name, known)}")

    def build() -> object:
        import numpy
        import tensorflow

        try:
            model = known[name](weights=None, input_shape=input_shape, classes=classes)
        except ValueError as error:
            shape = ",".join(map(str, input_shape))
            raise TargetError(f"keras:{name} with --input {shape} --classes {classes}: {error}") from error
        model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
        sample = (numpy.zeros(input_shape, "float32"), numpy.int32(0))
        count = max(_SYNTHETIC_SAMPLES, target_batch or 0)
        return model, tensorflow.data.Dataset.from_tensors(sample).repeat(count)

    return build


def _call(target: str, build: Callable[[], object]) -> tuple[Any, object, object]:
    returned = build()
    if isinstance(returned, tuple) and len(returned) in (2, 3) and _is_model(returned[0]):
        model, dataset = returned[0], returned[1]
        return model, dataset, returned[2] if len(returned) == 3 else None
    if isinstance(returned, tuple):
        received = f"({', '.join(type(item).__name__ for item in returned)})"
    else:
        received = "None" if returned is None else f"an object of type {type(returned).__name__}"
    raise TargetError(
        f"{target} must return (model, dataset), a compiled Keras model and its training data. Received: {received}"
    )


def _is_model(value: object) -> bool:
    return callable(getattr(value, "fit", None)) and callable(getattr(value, "train_step", None))


def _keras() -> Any:
    import keras

    return keras


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [known_name for known_name in known if not known_name.startswith("_")], 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _failure(error: BaseException, target: str) -> Message:
    """The message that tells the parent of ``error``."""
    if isinstance(error, NoFeasibleBatchError):
        sizes = {"needed_bytes": error.needed_bytes, "limit_bytes": error.limit_bytes}
        return {"kind": "no_feasible_batch", "message": str(error), **sizes}
    if isinstance(error, NotApplicableError):
        return {"kind": "not_applicable", "message": str(error)}
    diagnosis = oom.diagnose(error)
    if diagnosis.is_memory:
        return {"kind": "memory_error", "message": diagnosis.detail, "requested_bytes": diagnosis.requested_bytes}
    # Raised in autobatch itself: a model or data that it cannot take. Further out it is the user's own error.
    if isinstance(error, (AutobatchError, ValueError, TypeError)) and _raised_here(error):
        prefix = "" if isinstance(error, TargetError) else f"{target}: "
        return {"kind": "target_error", "message": prefix + str(error)}
    if isinstance(error, SystemExit):
        message = f"{target} called sys.exit({error.code!r})"
    else:
        message = traceback.format_exception_only(type(error), error)[-1].strip()
    return {"kind": "user_error", "message": message, "traceback": user_traceback(error)}


def _raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _is_own(frames[-1].filename)


def user_traceback(error: BaseException) -> str:
    """``error`` as Python prints it, from the user's first frame on."""
    report = traceback.TracebackException.from_exception(error)
    _trim(report)
    if not report.stack and report.__cause__ is None and report.__context__ is None:
        return "".join(report.format_exception_only())
    return "".join(report.format())


def _trim(report: traceback.TracebackException) -> None:
    frames = list(report.stack)
    users = [i for i, frame in enumerate(frames) if not _is_own(frame.filename) and not _is_library(frame.filename)]
    others = [i for i, frame in enumerate(frames) if not _is_own(frame.filename) and not _is_import(frame.filename)]
    first = next(iter(users or others), len(frames))
    report.stack = traceback.StackSummary.from_list(frames[first:])
    for link in (report.__cause__, report.__context__):
        if link is not None:
            _trim(link)


def _is_own(filename: str) -> bool:
    return os.path.abspath(filename).startswith(_OWN_CODE)


def _is_import(filename: str) -> bool:
    return filename.startswith("<frozen ")


def _is_library(filename: str) -> bool:
    return _is_import(filename) or os.path.abspath(filename).startswith(_LIBRARIES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
