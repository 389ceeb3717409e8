"""An update that keeps no copy of the weights is not begun where its room is not there: nothing has changed then."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nursery
import pytest

SCRIPT = Path(__file__).with_name("refused_update.py")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["whole", "accumulated"])
def test_an_update_without_room_for_itself_changes_nothing(mode):
    done = nursery.run(SCRIPT, mode, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["room"] >= 2 * 4 * 1024**2
    assert told["ended"] == "NoFeasibleBatchError", "an update that was begun ends in UpdateInterruptedError"
    assert "uint8" in told["message"], "the update's room was what was refused"
    assert told["same bits"]
    assert told["apart"] < 1e-6, "once there is room it goes on, as if nothing had been"
