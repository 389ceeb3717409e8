"""What TensorFlow's allocator tells its profiler of, against the allocator itself and against trials."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from autobatch.memory.allocations import Event, Recording, recording, trace_of

SCRIPT = Path(__file__).with_name("allocator_process.py")


def run(*modes, **changed):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_ENABLE_ONEDNN_OPTS": "0", **changed}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *modes], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


@pytest.fixture(scope="module")
def told():
    return run("busy", "broken", "step")


def test_the_model_puts_each_block_where_the_allocator_does():
    told = run("random", TF_CPP_MIN_LOG_LEVEL="0")
    seen = {**told["random"], "stderr": told["stderr"]}
    assert seen["taken_at_once"]
    assert seen["held_known"] == 13
    assert seen["same"] > 300
    assert seen["different"] <= 3
    assert "a message of another's" in seen["stderr"]
    assert "Profiler session" not in seen["stderr"]
    assert "XSpace" not in seen["stderr"]
    assert seen["replayed_peak"] == pytest.approx(seen["peak"], rel=0.005)


def test_where_another_profile_is_taken_or_the_block_fails_nothing_is_recorded_and_nothing_is_lost(told):
    seen = told["busy"]
    assert seen["beside_another"]
    assert seen["failed"] == 0
    assert seen["afterwards"] >= 1
    assert seen["after_a_failure"] >= 1
    assert seen["of_the_block"] == 2, "allocated and given back"
    assert seen["switched_off"] == 0


def test_a_broken_profile_costs_the_hint_and_nothing_else(told):
    seen = told["broken"]
    assert len(seen["told"]) == 12
    assert seen["told"].count(None) >= 3, "a file that was cut off is not believed"
    assert seen["unstarted"] == seen["unended"] == 0


@pytest.mark.slow
def test_a_trial_of_13_samples_tells_what_the_largest_size_will_do(told):
    seen = told["step"]
    assert seen["unasked"]
    assert seen["failed_tells_nothing"]
    assert seen["self"] == pytest.approx(1, rel=0.03)
    assert seen["near"] == pytest.approx(1, rel=0.03)
    assert seen["largest"] > 60
    assert seen["outcomes"] == ["fits", "out_of_memory"]


def event(allocated, address, requested, *, shape="", operation="", is_output=True, in_use=0, free=1 << 20):
    return Event(
        allocated, address, requested, -(-requested // 256) * 256, shape, operation, is_output, in_use, free, 0.0
    )


def test_a_block_grows_where_its_first_dimension_is_a_multiple_of_the_micro_batch():
    def size(requested, shape, micro_batch, **more):
        seen = Recording(events=[event(True, 256, requested, shape=shape, **more)])
        return trace_of(seen, micro_batch, {(32, 10)}).sizes[0]

    assert size(32 * 40, "[32,10]", 16) == (1280, 0)  # a weight's
    assert size(32 * 44, "[32,11]", 16) == (0, 88)  # two micro-batches of 16
    assert size(11 * 32 * 4, "[11,32]", 32) == (1408, 0)  # 32 may be anything there
    assert size(11 * 37 * 4, "[11,37]", 37) == (0, 44)  # 37 is no chance
    assert size(4, "[]", 1) == (4, 0)
    assert size(1000, "", 10) == (1000, 0)
    workspace = {"operation": "a/gradient_tape/Conv2DBackpropFilter", "is_output": False}
    assert size(13 * 256 * 4, "[13,64,4]", 13, **workspace) == (13312, 0)
    assert size(13 * 256 * 4, "[13,8,8,4]", 13, **workspace) == (0, 1024)


def test_pieces_of_one_operation_in_many_threads_are_not_operations_side_by_side():
    def told(outputs_in, temporaries_in):
        events, in_use = [], 0
        for number, (output_in, temporary_in) in enumerate(zip(outputs_in, temporaries_in, strict=True)):
            output, temporary = (1 << 30) + 4096 * number, (1 << 30) + 4096 * number + 2048
            for allocated, address, is_output, thread in (
                (True, output, True, output_in),
                (True, temporary, False, temporary_in),
                (False, temporary, True, temporary_in),  # that it was temporary is not told of what is given back
            ):
                in_use += 1024 if allocated else -1024
                found = event(allocated, address, 1024, is_output=is_output, in_use=in_use, free=(1 << 20) - in_use)
                events.append(replace(found, thread=thread))
        trace = trace_of(Recording(events=events), 10, ())
        return trace.in_parallel, trace.within_operations

    alone, others = [1] * 12, [2, 3] * 6
    assert told(alone, alone) == (False, False)
    assert told(alone, others) == (True, True)
    assert told(others, others) == (True, False)


def test_nothing_recorded_is_no_trace():
    assert trace_of(Recording(), 4, ()) is None


def test_what_was_held_lies_where_it_lay_and_what_is_unknown_in_the_smallest_hole():
    start = 1 << 40
    seen = Recording(
        held={start + 1024: 300, start + 61440: 512, 77: 4000},  # the last is in none of the allocator's regions
        events=[
            event(True, start + 8192, 4000, shape="[10,100]", in_use=1024 + 256 + 256 + 4096, free=60_000),
            event(False, start + 4096, 256, in_use=1024 + 256 + 4096, free=60_256),
            event(False, start + 8192, 4000, in_use=1024 + 256, free=64_352),
        ],
    )
    told = trace_of(seen, 10, ())
    assert (start + 1024 + 512, 256) in told.held  # what nobody names, in the smallest hole
    assert sum(taken for _, taken in told.held) == 1024 + 256 + 256
    assert (start + 1024, 512) in told.held
    assert (start + 4096, 256) in told.held
    known = len(told.held)
    freed = told.held.index((start + 4096, 256))
    assert told.order == (known, ~freed, ~known)
    assert told.sizes == ((0, 400),)
    (region_start, region_bytes) = told.regions[0]
    assert region_start == start + 1024
    assert region_start + region_bytes >= start + 8192 + 4096


def test_an_allocator_that_tells_nothing_is_not_profiled(monkeypatch):
    monkeypatch.setenv("TF_CPU_ALLOCATOR_USE_BFC", "0")
    monkeypatch.setattr("tensorflow.profiler.experimental.start", lambda *_: pytest.fail("profiled"))
    for device, variables in (("CPU:0", {}), ("GPU:0", {"TF_GPU_ALLOCATOR": "cuda_malloc_async"})):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with recording(device, []) as seen:
            pass
        assert seen.events == []
