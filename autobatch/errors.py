"""Every exception that autobatch raises on its own account.

::

    AutobatchError
    +-- NoFeasibleBatchError   not even a micro-batch of one sample fits
    +-- CannotBeCutError       the elements of a dataset cannot be cut into micro-batches, nor joined
    +-- FixedBatchSizeError    the model's code works with one number of samples at a time alone (a ValueError too)
    +-- UpdateInterruptedError the optimizer's update itself ran out of memory half-way and could not be undone
    +-- TargetError            the command line's TARGET cannot be used (no file, no function, wrong result)
    +-- UserCodeError          the user's code failed in a worker process; carries its traceback as text
    +-- WorkerError            a worker process could not be started or talked to
    +-- NotApplicableError     a remedy changes nothing in this model, or cannot be tried on it
    +-- WorkerLostError        another worker of a MultiWorkerMirroredStrategy died, failed or did not answer in time
    +-- WorkersDisagreeError   the workers of a MultiWorkerMirroredStrategy were given different data or models

    AutobatchWarning (a UserWarning)

A bad argument is a plain ``ValueError`` or ``TypeError`` that ends in "Received: ...". What the user's own model or
data raises is passed on unchanged.
"""

from __future__ import annotations

import sys
import warnings


class AutobatchError(Exception):
    """The root of autobatch's own exceptions."""


class NoFeasibleBatchError(AutobatchError):
    """Memory is too small: not even a micro-batch of one sample fits.

    ``needed_bytes`` is the least that one sample was seen to need; ``limit_bytes`` is what may be used. Either is None
    where the device keeps no such figure.
    """

    def __init__(self, message: str, *, needed_bytes: int | None = None, limit_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes


class CannotBeCutError(AutobatchError):
    """The elements of a dataset can be neither cut nor joined: ``reason`` names the line of the user's code.

    ``fit``, ``tune`` and ``wrap_step`` then take each element whole, and say so.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}, so that elements can be neither cut nor joined. Call autobatch.fit or autobatch.tune, which "
            "take each element whole."
        )
        self.reason = reason


class FixedBatchSizeError(AutobatchError, ValueError):
    """The model's own code works with one number of samples at a time alone, so that no batch can be cut."""


class UpdateInterruptedError(AutobatchError):
    """The optimizer's update ran out of memory half-way, and no copy of the weights had been kept to go back to."""


class TargetError(AutobatchError):
    """The TARGET of the command line cannot be used."""


class UserCodeError(AutobatchError):
    """The user's own code failed in a worker process.

    ``traceback_text`` starts at the user's first frame.
    """

    def __init__(self, message: str, *, traceback_text: str = "") -> None:
        super().__init__(message)
        self.traceback_text = traceback_text


class WorkerError(AutobatchError):
    """A worker process could not be started, or broke the protocol."""


class NotApplicableError(AutobatchError):
    """A remedy changes nothing in this model, or cannot be tried on it; the message says why."""


class WorkerLostError(AutobatchError):
    """Another worker of a MultiWorkerMirroredStrategy died, failed, or did not answer in time.

    TensorFlow's collectives cannot be used again in this process: start all workers anew.
    """

    has_ended = False
    """True if the other worker's process is gone; False if it is there, and failed or does not answer."""


class WorkersDisagreeError(AutobatchError):
    """The workers of a MultiWorkerMirroredStrategy do not train the same model on the same data."""


class AutobatchWarning(UserWarning):
    """Notice that the user should know of, while work goes on."""


def warn(message: str) -> None:
    """Warn with an :class:`AutobatchWarning` at the line of the user's code that has led here.

    That is the innermost line outside of autobatch and of installed packages. Where there is none, as in a program that
    is installed itself, it is the innermost line outside of autobatch.
    """
    from autobatch.tracebacks import frames_from, is_library

    frames = frames_from(sys._getframe(1))
    users = (frame for frame in frames if not is_library(frame.f_code.co_filename))
    frame = next(users, frames[0])
    warnings.warn_explicit(
        message,
        AutobatchWarning,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__") or "<string>",  # without a name Python would say nothing
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
