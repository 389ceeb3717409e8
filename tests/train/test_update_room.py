"""An optimizer's update takes less room than Keras's, and no more than was asked for before it began."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "update_room.py"


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    output = tmp_path_factory.mktemp("updates") / "update_room.json"
    command = [sys.executable, str(BENCHMARK), "--output", str(output)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.slow
class TestTheUpdateOfSixWeightsOfOneSize:
    def test_the_room_asked_for_is_enough_for_every_optimizer(self, updates):
        assert len(updates) == 20
        short = {name: update for name, update in updates.items() if update["used"] > update["room"] + 0.01}
        assert not short

    def test_it_holds_less_than_keras_does(self, updates):
        # Clipped gradients are all there at once in both, give or take one; averages of weights are Keras's own affair.
        at_once = {"clipnorm", "global_clipnorm", "clipvalue", "LossScaleOptimizer"}
        assert not {name for name in at_once if updates[name]["used"] > updates[name]["by_keras"] + 1.01}
        in_turn = updates.keys() - at_once - {"EMA"}
        assert not {name for name in in_turn if updates[name]["used"] >= updates[name]["by_keras"]}
        # One weight after another: what all of them together take is not there at any moment.
        assert updates["RMSprop"]["by_keras"] > 12
        assert updates["RMSprop"]["used"] <= 6
        assert updates["Adam"]["used"] <= 3

    def test_no_more_is_asked_for_than_a_few_weights(self, updates):
        assert updates["Adam"]["room"] <= 4
        assert updates["rows of a table"]["room"] <= 4
        # Gradients that are clipped all at once are all there before the first weight changes.
        assert updates["global_clipnorm"]["room"] >= 6
