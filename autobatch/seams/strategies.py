"""Private parts of ``tf.distribute``, and of Keras's use of it: the only place that touches them.

Seen with Keras 3.10 to 3.15 on TensorFlow 2.16 to 2.21; ``tests/seams/test_strategies.py`` fails loudly when a piece
moves. What a user sees of strategies (scopes, ``TF_CONFIG``, cluster resolvers, collectives) stays TensorFlow's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context as _context

from autobatch.seams.patching import replaced
from autobatch.seams.versions import why_not_on_several_devices

SUPPORTED = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)


def strategy_of(model: Any) -> Any:
    """Return the strategy that a Keras model was made under; None for a model of one device."""
    return getattr(model, "_distribute_strategy", None)


def require_supported_strategy(model: Any) -> None:
    """Refuse what cannot be trained under the strategy that the model was made under.

    Raises:
        ValueError: names it, and what to do instead.
    """
    strategy = strategy_of(model)
    if strategy is None and not tf.distribute.has_strategy():
        return
    if tf.distribute.has_strategy():
        raise ValueError(
            "autobatch.fit is called outside of the strategy's scope, on a model that was made and compiled inside it. "
            f"Received: a call under {type(tf.distribute.get_strategy()).__name__}.scope()"
        )
    if not isinstance(strategy, SUPPORTED):
        raise ValueError(
            "Training a model made under a tf.distribute strategy is not supported but for MirroredStrategy and "
            "MultiWorkerMirroredStrategy: make it under one of these, or outside of any strategy's scope. "
            f"Received: {type(strategy).__name__}"
        )
    if reason := why_not_on_several_devices():
        raise ValueError(reason)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        require_made_under(strategy, optimizer)
    if getattr(model, "run_eagerly", False) or getattr(model, "jit_compile", False) is True:
        raise ValueError(
            f"run_eagerly and jit_compile=True are not supported under {type(strategy).__name__}: compile the model "
            f"without them. Received: run_eagerly={model.run_eagerly}, jit_compile={model.jit_compile}"
        )
    synchronized = [layer.name for layer in model._flatten_layers() if getattr(layer, "synchronized", False)]
    if synchronized:
        raise ValueError(
            "A layer that talks to the other replicas in every micro-batch would leave them waiting when one runs out "
            "of memory. Use BatchNormalization without synchronized=True: its moving statistics are those of all "
            f"replicas' samples all the same. Received: {', '.join(synchronized)}"
        )


def spans_workers(strategy: Any) -> bool:
    """Return True if the strategy joins several processes."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and bool(
        strategy.extended._in_multi_worker_mode()
    )


def worker_of(strategy: Any) -> tuple[int, int]:
    """Return this process's number among the workers of the strategy, and the number of workers."""
    if not spans_workers(strategy):
        return 0, 1
    devices = len(strategy.extended.worker_devices)
    return int(strategy.extended._id_in_cluster), int(strategy.num_replicas_in_sync) // devices


def devices_of(strategy: Any) -> tuple[str, ...]:
    """Return the devices of this process's replicas, as "GPU:0", in the order of the replicas' numbers here."""
    specs = [tf.DeviceSpec.from_string(device) for device in strategy.extended.worker_devices]
    return tuple(f"{spec.device_type}:{spec.device_index}" for spec in specs)


def first_copy_of(variable: Any) -> Any:
    """Return the copy on the first device here of the variable that this one is a copy of; itself if it is none.

    Private: ``_distributed_container``, on the variable or its handle. Without it every variable counts as a first.
    """
    for owner in (variable, getattr(variable, "handle", None)):
        container = getattr(owner, "_distributed_container", None)
        if container is not None and container() is not None:
            return container().values[0]
    return variable


def replica_here() -> int:
    """Return the number of the replica that is being traced, among those of this process."""
    context = tf.distribute.get_replica_context()
    number = int(tf.get_static_value(context.replica_id_in_sync_group))
    return number % len(context.strategy.extended.worker_devices)


def in_own_row(tensor: Any) -> Any:
    """Return a tensor with a row for each replica of the strategy: this replica's holds ``tensor``, the others zeros.

    The sum over all replicas has every replica's tensor in its row.
    """
    context = tf.distribute.get_replica_context()
    row = int(tf.get_static_value(context.replica_id_in_sync_group))
    padding = [[row, context.num_replicas_in_sync - 1 - row], *[[0, 0]] * tensor.shape.rank]
    return tf.pad(tensor[None], padding)


@contextlib.contextmanager
def keras_on_one_device(model: Any, metrics_result: Callable[[], dict[str, Any] | None]) -> Iterator[None]:
    """Keep Keras's ``fit`` from distributing data and reading metrics itself, while the context is open.

    Keras's own way fails under several workers: it hands ``PerReplica`` values to functions that take tensors. Each
    metric that it reads there is also a collective of its own. ``metrics_result`` returns the metrics of all replicas,
    None where nothing has run yet.
    """

    def of_all_replicas(original: Callable[[], Any]) -> Callable[[], Any]:
        def get_metrics_result() -> dict[str, Any]:
            known = metrics_result() if tf.executing_eagerly() else None
            return dict(original() if known is None else known)

        return get_metrics_result

    strategy, model._distribute_strategy = model._distribute_strategy, None
    try:
        with replaced(model, "get_metrics_result", of_all_replicas, on_every_thread=True):
            yield
    finally:
        model._distribute_strategy = strategy


def abort_collectives(message: str) -> None:
    """End every collective that is under way in this process, and all later ones; peers learn of it as well."""
    _context.context().abort_collective_ops(tf.errors.DEADLINE_EXCEEDED, message)


def unreachable_peers(strategy: Any, timeout_seconds: float = 2.0) -> tuple[str, ...]:
    """Return the workers that do not answer a health check, as "worker 1"."""
    spec = strategy.cluster_resolver.cluster_spec()
    own = (strategy.cluster_resolver.task_type, strategy.cluster_resolver.task_id)
    silent = []
    for job in spec.jobs:
        for task in range(spec.num_tasks(job)):
            if (job, task) == own:
                continue
            try:
                _context.context().check_collective_ops_peer_health(
                    f"/job:{job}/replica:0/task:{task}", timeout_in_ms=int(1000 * timeout_seconds)
                )
            except tf.errors.OpError:
                silent.append(f"{job} {task}")
    return tuple(silent)


def global_seed() -> int | None:
    """Return the seed of ``tf.random.set_seed``; None if none was set."""
    seed = _context.global_seed()
    return None if seed is None else int(seed)


def initial_epoch(model: Any) -> int:
    """Return the epoch that a callback has restored for ``fit`` to begin with; 0 if none has."""
    return int(getattr(model, "_initial_epoch", None) or 0)


def begin_at_epoch(model: Any, epoch: int) -> None:
    """Let ``fit`` begin with this epoch, as ``BackupAndRestore`` does."""
    model._initial_epoch = epoch


def never_write(backup: Any) -> None:
    """Let a ``BackupAndRestore`` only read: it neither saves nor deletes."""
    backup._save_model = lambda: None
    backup.delete_checkpoint = False


def require_made_under(strategy: Any, optimizer: Any) -> None:
    """Refuse an optimizer that was made outside of the strategy's scope.

    Raises:
        ValueError: names it.
    """
    if optimizer._distribution_strategy is not strategy:
        raise ValueError(
            "The optimizer was made outside of the strategy's scope: make it, and call compile, inside of "
            f"`with strategy.scope():`. Received: {optimizer.name!r}"
        )
