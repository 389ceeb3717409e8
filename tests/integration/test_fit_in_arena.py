"""A target that does not fit, in a genuinely limited arena, ends where plain Keras ends with unlimited memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import nursery
import pytest
from models import relative_error

SCRIPT = Path(__file__).with_name("arena_fit.py")


def run(mode, path):
    done = nursery.run(SCRIPT, mode, path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def weights(path):
    with np.load(path) as archive:
        return [archive[name] for name in archive.files]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    plain, _ = run("plain", folder / "plain.npz")
    limited, log = run("limited", folder / "limited.npz")
    return folder, plain, limited, log


@pytest.mark.slow
def test_the_weights_are_those_of_plain_fit(both):
    folder, plain, limited, _ = both
    assert relative_error(weights(folder / "limited.npz"), weights(folder / "plain.npz")) < 1e-9
    assert limited["iterations"] == plain["iterations"] == 3
    for name, values in plain["history"].items():
        np.testing.assert_allclose(limited["history"][name], values, rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_the_target_did_not_fit_and_every_peak_was_within_the_limit(both):
    _, _, limited, _ = both
    assert limited["limit"] == 112 * 2**20
    assert limited["plan"][1] > 1
    assert all(peak <= limited["limit"] for peak in limited["peaks"])
    assert limited["recoveries"] == 0


@pytest.mark.slow
def test_running_out_in_training_changes_nothing_but_the_micro_batch(both):
    folder, _, limited, log = both
    assert limited["forced"], "the whole target was meant not to fit"
    before, after, detail = limited["forced"][0]
    assert before == 400
    assert after < before
    assert "OOM when allocating" in detail
    assert f"micro-batch {before} -> {after}" in log
    assert relative_error(weights(folder / "limited-forced.npz"), weights(folder / "plain.npz")) < 1e-9
