"""What a death means, for each end of a process and each sign of memory."""

import signal

import pytest

from autobatch.handover.status import Doing, ProcessStatus
from autobatch.restart.judgement import judge


class Signs:
    """Signs of memory as they were seen."""

    def __init__(self, counted="", gone="", full=""):
        self._counted, self._gone, self._full = counted, gone, full

    def kernels_kill(self):
        return self._counted

    def nearly_gone(self):
        return self._gone

    def shared_memory_is_full(self):
        return self._full

    def as_words(self):
        return "plenty"


NOTHING = Signs()
NO_WORDS = "; no last words of it were seen"
UPDATE = ProcessStatus(training=1, doing=Doing.UPDATE, micro_batch=64, smaller=48)
ON_CPU = ProcessStatus(training=1, doing=Doing.UPDATE, micro_batch=64, smaller=48, device_is_host=True)
BETWEEN = ProcessStatus(training=2, device_is_host=True)
TRIAL = ProcessStatus(training=1, doing=Doing.TRIAL, micro_batch=64)
ARENA = ProcessStatus(training=1, doing=Doing.UPDATE, micro_batch=64, smaller=48, device_is_host=True, in_arena=True)
BAD_ALLOC = "terminate called after throwing an instance of 'std::bad_alloc'"
EIGEN = "F tensorflow/core: EigenAllocator for GPU ran out of memory"
POISON = "F tensorflow: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("by", "status", "words", "signs", "seen", "changes", "size"),
    [
        ("SIGKILL", UPDATE, "", Signs(counted="0 -> 1"), "killed by the kernel", "with shorter queues", None),
        ("SIGKILL", None, "", Signs(counted="0 -> 1"), "killed by the kernel", "", None),
        ("SIGKILL", BETWEEN, "", Signs(gone="1 MiB"), "killed with the host's memory", "with shorter queues", None),
        *(
            (
                "SIGKILL",
                on_cpu,
                "",
                Signs(counted="0 -> 1"),
                "killed by the kernel",
                f"with shorter queues and {to}",
                64,
            )
            for on_cpu, to in ((ON_CPU, "at micro-batch 48"), (ARENA, "at micro-batch 48"))
        ),
        ("SIGABRT", UPDATE, BAD_ALLOC, NOTHING, "ended by SIGABRT for want of host", "with shorter queues", None),
        ("SIGABRT", UPDATE, EIGEN, NOTHING, "ended by SIGABRT for want of device", "at micro-batch 48", 64),
        ("SIGABRT", TRIAL, EIGEN, NOTHING, "ended by SIGABRT for want of device", "with trials of at most 32", 64),
        ("SIGABRT", UPDATE, POISON, NOTHING, "device lost", "at micro-batch 48", 64),
        ("SIGSEGV", ARENA, "", NOTHING, "ended by SIGSEGV for want of device", "at micro-batch 48", 64),
        ("SIGSEGV", UPDATE, "", Signs(gone="1 MiB"), "ended by SIGSEGV for want of host", "with shorter queues", None),
        ("SIGBUS", UPDATE, "", Signs(full="full"), "ended by SIGBUS for want of host", "with shorter queues", None),
    ],
)
def test_deaths_for_want_of_memory(by, status, words, signs, seen, changes, size):
    found = judge(-signal.Signals[by], status, words, signs)
    assert found.death is not None
    assert found.seen.startswith(seen)
    assert found.evidence
    assert found.changes == changes
    assert found.death.micro_batch == size
    assert found.of_host == ("host" in found.seen)


@pytest.mark.parametrize(
    ("by", "status", "words", "signs"),
    [
        ("SIGKILL", ARENA, BAD_ALLOC, NOTHING),
        ("SIGSEGV", UPDATE, "", NOTHING),
        ("SIGSEGV", UPDATE, "", Signs(full="full")),
        ("SIGSEGV", ProcessStatus(training=1, in_arena=True), "", NOTHING),
        ("SIGABRT", ARENA, "assertion failed", NOTHING),
        ("SIGABRT", UPDATE, "", Signs(counted="0 -> 1")),
    ],
)
def test_a_death_without_a_sign_is_explained_and_passed_on(by, status, words, signs):
    found = judge(-signal.Signals[by], status, words, signs)
    assert found.death is None
    assert f"by {by}, and nothing tells of memory" in found.seen
    assert found.evidence == ("plenty" if words else f"plenty{'' if by == 'SIGKILL' else NO_WORDS}")


@pytest.mark.parametrize("exit_code", [0, 1, 2, 134, 137, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, -64])
def test_an_end_of_its_own_is_passed_on_without_a_word(exit_code):
    found = judge(exit_code, UPDATE, BAD_ALLOC, Signs(gone="1 MiB"))
    assert (found.death, found.seen) == (None, "")


def test_a_worker_that_was_lost_is_waited_for_by_a_new_process():
    left = ProcessStatus(training=1, micro_batch=64, poison="Worker 1 is lost", worker_is_lost=True)
    found = judge(1, left, "", NOTHING)
    assert (found.seen, found.evidence) == ("another worker of its training was lost", "Worker 1 is lost")
    assert found.changes == ""
    assert found.death is not None
    assert found.death.micro_batch is None
    assert judge(0, left, "", NOTHING).death is None


def test_a_poison_counts_where_the_script_ended_by_an_error():
    poisoned = ProcessStatus(
        training=1, doing=Doing.UPDATE, micro_batch=64, smaller=48, poison="CUDA_ERROR_LAUNCH_FAILED"
    )
    found = judge(1, poisoned, "", NOTHING)
    assert (found.seen, found.changes, found.evidence) == ("device lost", "at micro-batch 48", poisoned.poison)
    for exit_code in (0, 2, -signal.SIGTERM):
        assert judge(exit_code, poisoned, "", NOTHING).death is None
