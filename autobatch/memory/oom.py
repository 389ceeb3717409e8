"""The only place that decides whether an exception, or the end of a process, means out of memory.

All the knowledge stands in two tables, `EXCEPTION_ROWS` and `EXIT_ROWS`. They are read from the top, and the first row
that matches decides. Exceptions are recognised by the *name* of their class and of its module, so TensorFlow is not
imported here. Messages are searched, never matched from the start, because TensorFlow, Keras and `tf.py_function` all
put text in front.

A failure that is not in the tables is not memory. A message alone is never enough: a ``ValueError`` that mentions "OOM"
is the user's own.
"""

from __future__ import annotations

import builtins
import enum
import errno
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass

from autobatch.memory.requested_bytes import requested_bytes
from autobatch.units import format_bytes

_DETAIL_LENGTH = 200


class FailureKind(enum.Enum):
    """The meaning of a failure for the next try."""

    DEVICE = "device"
    """The device that computes has no room (the CPU too, where TensorFlow computes on it): go smaller."""
    HOST = "host"
    """The host has no room: a data pipeline, NumPy, pinned buffers, the kernel's out-of-memory killer."""
    AMBIGUOUS = "ambiguous"
    """Most likely memory, not certainly: go smaller, in a fresh process if possible."""
    POISONED = "poisoned"
    """Not memory, and nothing will work in this process any more: stop."""
    NOT_MEMORY = "not_memory"
    """Anything else, the user's own bugs above all."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The finding about one failure.

    ``requested_bytes`` is the size of the allocation that its message names, None if it names none. ``detail`` is the
    failure in one line.
    """

    kind: FailureKind
    requested_bytes: int | None = None
    detail: str = ""

    @property
    def is_memory(self) -> bool:
        """True if a smaller size may succeed where this one failed."""
        return self.kind in (FailureKind.DEVICE, FailureKind.HOST, FailureKind.AMBIGUOUS)


@dataclass(frozen=True, slots=True)
class ExceptionRow:
    """A row of `EXCEPTION_ROWS`.

    ``classes`` matches the name of an exception class with its module, as `_names` spells it; ``message`` is searched
    for in the exception's message.
    """

    classes: re.Pattern[str]
    message: re.Pattern[str]
    kind: FailureKind
    source: str


@dataclass(frozen=True, slots=True)
class ExitRow:
    """A row of `EXIT_ROWS`.

    ``stderr`` is searched for in what the process wrote last. A row with ``arena`` holds only for a process whose CPU
    memory was limited to an arena.
    """

    signals: tuple[signal.Signals, ...]
    stderr: re.Pattern[str]
    kind: FailureKind
    source: str
    arena: bool = False


def _row(classes: str, message: str, kind: FailureKind, source: str) -> ExceptionRow:
    # A class is written with its module where it is raised, and without one inside a message (tf.py_function).
    return ExceptionRow(
        re.compile(rf"(?:{classes})\Z"), re.compile(message, re.IGNORECASE | re.MULTILINE), kind, source
    )


_TF = r"(?:tensorflow\.[\w.]*)?"
# Not InvalidArgumentError: that is what a ValueError or TypeError in a tf.py_function becomes, whatever it says.
_STATUS = (
    rf"{_TF}(?:Internal|Unknown|NotFound|Unimplemented|FailedPrecondition|Aborted|Unavailable|ResourceExhausted)Error"
)
_EXHAUSTED = rf"{_TF}ResourceExhaustedError"

_POISON = (
    r"CUDA_ERROR_(?:ILLEGAL_ADDRESS|LAUNCH_FAILED|ILLEGAL_INSTRUCTION|MISALIGNED_ADDRESS|INVALID_ADDRESS_SPACE"
    r"|HARDWARE_STACK_ERROR|INVALID_PC|ASSERT|LAUNCH_TIMEOUT|ECC_UNCORRECTABLE|CONTEXT_IS_DESTROYED|NVLINK_UNCORRECTABLE)"
    r"|an illegal memory access was encountered|unspecified launch failure|device-side assert triggered"
    r"|GPU is lost|has fallen off the bus"
)

EXCEPTION_ROWS: tuple[ExceptionRow, ...] = (
    _row(_STATUS, _POISON, FailureKind.POISONED, "CUDA driver API: the context is unusable until the process ends"),
    _row(
        rf"{_TF}\w+Error",
        r"^\s*\(\d+\)\s*RESOURCE_EXHAUSTED:\s+OOM when allocating",
        FailureKind.DEVICE,
        "tensorflow/core/util/status_util: several replicas failed, and the class is that of the first",
    ),
    _row(
        rf"{_TF}CancelledError",
        r"group is cancelled",
        FailureKind.POISONED,
        "seen with MirroredStrategy: one replica ran out inside a collective, and every later step fails",
    ),
    _row(
        rf"{_TF}CancelledError",
        r"RecvAsync is cancelled",
        FailureKind.AMBIGUOUS,
        "https://github.com/deepmodeling/deepmd-kit/pull/2504: out of memory, of which the executor says only this",
    ),
    _row(
        _EXHAUSTED,
        r"no space left on device|too many open files|disk quota|larger than max|quota exceeded",
        FailureKind.NOT_MEMORY,
        "TensorFlow maps ENOSPC, EMFILE and gRPC's message limit to the same class (tsl/platform/errors)",
    ),
    _row(
        _EXHAUSTED,
        r"failed to allocate memory for the batch of component",
        FailureKind.HOST,
        "tensorflow/core/data: tf.data's batch() builds its batch on the host",
    ),
    _row(
        _EXHAUSTED,
        r"by allocator \w*host\w*|\b\w*MemoryError\b|allocate (?:pinned )?host memory",
        FailureKind.HOST,
        "TensorFlow's pinned host allocator; a MemoryError that tf.py_function or tf.numpy_function carried out",
    ),
    _row(
        _EXHAUSTED,
        r"ran out of memory trying to instantiate command buffer",
        FailureKind.AMBIGUOUS,
        "XLA on the GPU: CUDA graphs live outside the pool",
    ),
    _row(
        _EXHAUSTED,
        r"OOM when allocating|out of memory|ran out of memory|failed to allocate|scratch space",
        FailureKind.DEVICE,
        "tensorflow/core/framework/op_kernel.cc; XLA's buffer allocation",
    ),
    _row(_EXHAUSTED, r"", FailureKind.AMBIGUOUS, "a resource ran out and the message does not say which"),
    _row(
        rf"{_TF}InternalError",
        r"dst tensor is not initialized",
        FailureKind.DEVICE,
        "tensorflow/core/common_runtime: the copy to the device found no room",
    ),
    _row(
        _STATUS,
        r"CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|out of memory (?:while )?(?:trying to )?allocat",
        FailureKind.DEVICE,
        "CUDA driver and runtime",
    ),
    _row(
        _STATUS,
        r"No algorithm worked|none of the algorithms provided by cudnn|failed to allocate the scratch space"
        r"|failed to get convolution algorithm|autotuning failed|no valid config found",
        FailureKind.AMBIGUOUS,
        "tensorflow/core/kernels/conv_ops*: cuDNN's autotuning, where every workspace was too big, or none exists",
    ),
    _row(
        _STATUS,
        r"failed to create (?:cublas|cusolver|cusparse|cufft|cudnn)\w* handle|could not create cudnn handle"
        r"|CU(?:DNN|BLAS|SOLVER|SPARSE|FFT|RAND)_STATUS_(?:INTERNAL_ERROR_DEVICE_ALLOCATION|ALLOC_FAILED|NOT_INITIALIZED)"
        r"|DNN library (?:is not found|initialization failed)|without BLAS support"
        r"|blas x?gem[mv]\w* launch failed",
        FailureKind.AMBIGUOUS,
        "cuBLAS, cuDNN and cuSOLVER need room outside TensorFlow's pool, which does not give any back",
    ),
    _row(
        _STATUS,
        r"ran out of memory|failed to allocate|OOM when allocating",
        FailureKind.AMBIGUOUS,
        "another status code around an allocation that failed",
    ),
    _row(
        r"(?:builtins\.)?MemoryError|(?:numpy\.[\w.]*)?_ArrayMemoryError",
        r"",
        FailureKind.HOST,
        "Python, NumPy, and C++'s std::bad_alloc where pybind11 carries it over",
    ),
    _row(r"(?:builtins\.)?OSError", rf"\[Errno {errno.ENOMEM}\]", FailureKind.HOST, "ENOMEM of fork, mmap and read"),
    _row(
        r"torch\.(?:\w+\.)*OutOfMemoryError",
        r"",
        FailureKind.DEVICE,
        "a torch data loader or py_function beside TensorFlow",
    ),
    _row(r"(?:builtins\.)?RuntimeError", r"DefaultCPUAllocator: ", FailureKind.HOST, "torch's host allocator"),
)


def _exit_row(
    signals: tuple[signal.Signals, ...], stderr: str, kind: FailureKind, source: str, *, arena: bool = False
) -> ExitRow:
    return ExitRow(signals, re.compile(stderr, re.IGNORECASE), kind, source, arena)


def _signals(*names: str) -> tuple[signal.Signals, ...]:
    return tuple(signal.Signals[name] for name in names if name in signal.Signals.__members__)


_CRASHES = _signals("SIGABRT", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")
_SILENT = _signals("SIGSEGV", "SIGBUS")
_KILL = _signals("SIGKILL")  # absent on Windows

EXIT_ROWS: tuple[ExitRow, ...] = (
    _exit_row(_CRASHES, _POISON, FailureKind.POISONED, "the driver's errors, as TensorFlow logs them before it aborts"),
    _exit_row(_KILL, r"", FailureKind.HOST, "what the kernel does when the host or the cgroup has no memory left"),
    _exit_row(_CRASHES, r"std::bad_alloc|cannot allocate memory", FailureKind.HOST, "C++ new found no host memory"),
    _exit_row(
        (signal.SIGABRT,),
        r"EigenAllocator for GPU ran out of memory|CUDA_ERROR_OUT_OF_MEMORY",
        FailureKind.DEVICE,
        "tensorflow/core/common_runtime/gpu: Eigen has no way to report it, so it aborts",
    ),
    _exit_row(
        _CRASHES,
        r"ran out of memory|OOM when allocating|out of memory|bfc_allocator\.cc",
        FailureKind.AMBIGUOUS,
        "an allocation failed shortly before, and a kernel did not look",
    ),
    _exit_row(
        _SILENT,
        r"",
        FailureKind.AMBIGUOUS,
        "kernels that do not check what a full arena gave them crash without a word",
        arena=True,
    ),
)


def diagnose(error: BaseException) -> Diagnosis:
    """Decide what ``error`` means for memory.

    The search covers ``__cause__``, ``__context__`` (unless suppressed), the members of exception groups, and the
    exception that ``tf.py_function`` reports inside the text of an ``UnknownError``. A poisoned device anywhere among
    them decides; otherwise the outermost exception that says anything about memory does. ``KeyboardInterrupt`` and its
    like are never memory, whatever was being handled when they came.
    """
    found = Diagnosis(FailureKind.NOT_MEMORY, detail=_one_line(type(error).__name__, str(error)))
    if not isinstance(error, Exception) and not hasattr(error, "exceptions"):
        return found
    for link in _chain(error):
        diagnosis = _classify(_names(link), str(link))
        if diagnosis is None:
            continue
        if diagnosis.kind is FailureKind.POISONED:
            return diagnosis
        if found.kind is FailureKind.NOT_MEMORY:
            found = diagnosis
    return found


def diagnose_exit(returncode: int | None, stderr_tail: str = "", *, arena: bool = False) -> Diagnosis:
    """Decide what the end of a process means for memory.

    Args:
        returncode: exit code as `subprocess` and `multiprocessing` give it, negative for a signal; None if the process
            has not ended. A shell's 128 + signal is understood. A parent that killed the process itself must not ask.
        stderr_tail: the end of what the process wrote to standard error.
        arena: True if it ran in a limited arena, where a crash without a word is most likely memory.
    """
    if returncode is None:
        return Diagnosis(FailureKind.NOT_MEMORY, detail="the process has not ended")
    if returncode == 0:
        return Diagnosis(FailureKind.NOT_MEMORY, detail="the process ended normally")
    number = -returncode if returncode < 0 else returncode - 128
    try:
        ended_by = signal.Signals(number)
    except ValueError:
        return _from_traceback(returncode, stderr_tail)
    for row in EXIT_ROWS:
        if ended_by in row.signals and (arena or not row.arena):
            match = row.stderr.search(stderr_tail)
            if match:
                text = _line_around(stderr_tail, match) if match.group() else row.source
                size = requested_bytes(text) or requested_bytes(stderr_tail)
                return Diagnosis(row.kind, size, _one_line(ended_by.name, text, size))
    return Diagnosis(FailureKind.NOT_MEMORY, detail=_one_line(f"the process was ended by {ended_by.name}", ""))


_INNER = re.compile(r"(?:\A|\}\}\s*|\n\s*|: )(?P<name>[A-Za-z_][\w.]*(?:Error|Exception)): (?P<message>.*)")
_PY_FUNCTION = re.compile(r"\bPyFunc|EagerPyFunc|script_ops\.py|\nTraceback \(most recent call last\)")
_CHAINED = ("direct cause of the following exception", "another exception occurred")
_TRACEBACK_END = re.compile(r"^(?P<name>[A-Za-z_][\w.]*): (?P<message>.*)|^(?P<bare>MemoryError)\s*$", re.MULTILINE)


def _classify(names: tuple[str, ...], message: str) -> Diagnosis | None:
    if any(name.endswith("UnknownError") for name in names):
        inner = _inside_py_function(message)
        if inner:
            known = (_classify((name,), text) for name, text in inner)
            return next((diagnosis for diagnosis in known if diagnosis is not None), None)
    for row in EXCEPTION_ROWS:
        if any(row.classes.match(name) for name in names):
            match = row.message.search(message)
            if match:
                text = _line_around(message, match) if match.group() else message
                size = requested_bytes(message) if row.kind is not FailureKind.NOT_MEMORY else None
                return Diagnosis(row.kind, size, _one_line(names[0].rpartition(".")[2], text, size))
    return None


def _inside_py_function(message: str) -> list[tuple[str, str]]:
    """Return name and message of each exception that ended a `tf.py_function`, outermost first; [] if there is none."""
    if not _PY_FUNCTION.search(message):
        return []
    found = [(match.group("name"), match.group("message")) for match in _INNER.finditer(message)]
    # The text behind the first exception is its traceback. Others in there count only where Python says that the first
    # one came from them.
    return found if any(text in message for text in _CHAINED) else found[:1]


def _names(error: BaseException) -> tuple[str, ...]:
    return tuple(
        f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__ if issubclass(cls, BaseException)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the exception and all that it came from, outermost first."""
    pending, seen = [error], set()
    while pending:
        link = pending.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        # ExceptionGroup is a builtin only from Python 3.11 on; before it, the backport has the same attribute.
        members = getattr(link, "exceptions", ())
        if isinstance(members, tuple):
            pending += [member for member in members if isinstance(member, BaseException)]
        if link.__cause__ is not None:
            pending.append(link.__cause__)
        elif link.__context__ is not None and not link.__suppress_context__:
            pending.append(link.__context__)


def _from_traceback(returncode: int, stderr_tail: str) -> Diagnosis:
    ends = [match for match in _TRACEBACK_END.finditer(stderr_tail) if _is_exception_name(match.group("name"))]
    if ends:
        last = ends[-1]
        name = last.group("bare") or last.group("name")
        diagnosis = _classify((name,), stderr_tail[last.start("message") :] if last.group("name") else "")
        if diagnosis is not None:
            return diagnosis
        return Diagnosis(FailureKind.NOT_MEMORY, detail=_one_line(name, last.group("message") or ""))
    return Diagnosis(FailureKind.NOT_MEMORY, detail=f"the process ended with exit code {returncode}")


def _is_exception_name(name: str | None) -> bool:
    if name is None:
        return True  # the bare MemoryError
    builtin = getattr(builtins, name, None)
    return name.endswith(("Error", "Exception")) or (isinstance(builtin, type) and issubclass(builtin, BaseException))


def _line_around(text: str, match: re.Match[str]) -> str:
    start = text.rfind("\n", 0, match.start()) + 1
    line = text[start:].partition("\n")[0]
    # A long line is cut in front of what was recognised, not behind it.
    return line if match.end() - start < _DETAIL_LENGTH else text[match.start() :].partition("\n")[0]


def _one_line(name: str, message: str, size: int | None = None) -> str:
    text = re.sub(r"\{\{[^}]*\}\}\s*|\x1b\[[0-9;]*m", "", message).strip()
    line = text.partition("\n")[0].strip()
    short = line if len(line) <= _DETAIL_LENGTH else line[: _DETAIL_LENGTH - 3] + "..."
    return (f"{name}: {short}" if short else name) + (f" [{format_bytes(size)}]" if size else "")
