"""Judgement of a death: whether memory was its cause, and what the next process should do otherwise.

* SIGKILL: if the kernel counts a kill for memory, or nearly no memory was left shortly before.
* SIGABRT, SIGSEGV, SIGBUS and other crashes: if its last words say so, as the table in :mod:`autobatch.memory.oom`
  knows them. Or if a step or a trial of ``fit`` was under way in a limited arena, whose kernels crash without a word.
  Or if nearly no memory was left. SIGBUS also if ``/dev/shm`` is full.
* Exit code 1: if ``fit`` has noted a poisoned device, or that the process of another worker has ended. That one is
  started again by the command that runs it, and nobody can train with the others but new processes.
* Anything else: never.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from autobatch.handover.causes import Death
from autobatch.handover.status import Doing, ProcessStatus
from autobatch.memory.oom import FailureKind, diagnose_exit
from autobatch.restart.memory_signs import MemorySigns

CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_SAID = {Doing.TRIAL: "trial", Doing.UPDATE: "update", Doing.VALIDATION: "validation"}


@dataclass(frozen=True, slots=True)
class Judgement:
    """Finding about the end of a process.

    ``death`` is None if memory was not its cause, or nothing shows it. ``seen`` is what was seen, as the beginning of a
    sentence; "" if there is nothing to say. ``evidence`` says by what. ``changes`` is what the next process does
    otherwise. ``of_host`` is True for host memory.
    """

    death: Death | None
    seen: str
    evidence: str = ""
    changes: str = ""
    of_host: bool = False


_OF_ITS_OWN = Judgement(None, "")


def judge(exit_code: int, status: ProcessStatus | None, last_words: str, signs: MemorySigns) -> Judgement:
    """Decide what the end of a process means.

    ``exit_code`` is negative for a signal. ``status`` is what its ``fit`` has noted last, ``last_words`` what it has
    written to standard error, as far as that can be read.
    """
    status = status or ProcessStatus()
    if exit_code >= 0:
        return _of_exit(exit_code, status, signs)
    if -exit_code == signal.SIGKILL:
        return _of_kill(status, signs)
    if -exit_code in CRASHES:
        return _of_crash(signal.Signals(-exit_code), status, last_words, signs)
    return _OF_ITS_OWN


def _of_exit(exit_code: int, status: ProcessStatus, signs: MemorySigns) -> Judgement:
    if exit_code == 1 and status.worker_is_lost:
        seen = "another worker of its training was lost"
        return Judgement(_death(seen, status, of_size=False), seen, status.poison)
    if exit_code == 1 and status.poison:
        return _for_device("device lost", status.poison, status)
    counted = signs.kernels_kill() if exit_code else ""
    if counted:
        seen = f"the kernel has killed a process for host memory, and the script ended by itself with {exit_code}"
        return Judgement(None, seen, counted)
    return _OF_ITS_OWN


def _of_kill(status: ProcessStatus, signs: MemorySigns) -> Judgement:
    counted = signs.kernels_kill()
    if counted:
        return _for_host("killed by the kernel for host memory", counted, status)
    gone = signs.nearly_gone()
    if gone:
        return _for_host("killed with the host's memory nearly gone", gone, status)
    return Judgement(None, "killed by SIGKILL, and nothing tells of memory", signs.as_words())


def _size_counts(status: ProcessStatus) -> bool:
    """Return True if a training was in a step or a trial, and can be told to begin smaller."""
    return status.training > 0 and status.doing is not Doing.ELSE


def _of_crash(by: signal.Signals, status: ProcessStatus, last_words: str, signs: MemorySigns) -> Judgement:
    in_step = status.doing is not Doing.ELSE
    diagnosis = diagnose_exit(-by, last_words, arena=status.in_arena and in_step)
    detail = diagnosis.detail.removeprefix(f"{by.name}: ")
    if diagnosis.kind is FailureKind.POISONED:
        return _for_device("device lost", detail, status)
    if diagnosis.kind is FailureKind.HOST:
        return _for_host(f"ended by {by.name} for want of host memory", detail, status)
    if diagnosis.is_memory:
        return _for_device(f"ended by {by.name} for want of device memory", detail, status)
    gone = signs.nearly_gone() or (signs.shared_memory_is_full() if by is signal.SIGBUS else "")
    if gone:
        return _for_host(f"ended by {by.name} for want of host memory", gone, status)
    unheard = "" if last_words.strip() else "; no last words of it were seen"
    return Judgement(None, f"ended by {by.name}, and nothing tells of memory", signs.as_words() + unheard)


def _for_host(seen: str, evidence: str, status: ProcessStatus) -> Judgement:
    """Make the finding for host memory; on a CPU that is what a micro-batch takes, too."""
    of_size = status.device_is_host and _size_counts(status)
    changes = ["with shorter queues"] if status.training else []
    if of_size:
        changes.append(_smaller(status))
    return Judgement(_death(seen, status, of_size=of_size), seen, evidence, " and ".join(changes), of_host=True)


def _for_device(seen: str, evidence: str, status: ProcessStatus) -> Judgement:
    of_size = _size_counts(status)
    return Judgement(_death(seen, status, of_size=of_size), seen, evidence, _smaller(status) if of_size else "")


def _smaller(status: ProcessStatus) -> str:
    if status.doing is Doing.TRIAL:
        return f"with trials of at most {status.micro_batch // 2}"
    return f"at micro-batch {status.smaller}"


def _death(seen: str, status: ProcessStatus, *, of_size: bool) -> Death:
    size = status.micro_batch if of_size and status.micro_batch else None
    return Death(seen, status.training, _SAID.get(status.doing, ""), size)
