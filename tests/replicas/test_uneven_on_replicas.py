"""Replicas share two streams in proportion, and refuse what cannot be shared."""

import json
from pathlib import Path

import nursery
import pytest

SCRIPT = Path(__file__).parents[1] / "integration" / "uneven_on_replicas.py"


@pytest.fixture(scope="module")
def found():
    done = nursery.run(SCRIPT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "micro_batches"), [("streams", [2, 2]), ("two to three", [8])])
def test_replicas_share_streams_in_proportion(found, name, micro_batches):
    assert found[name]["off"] < 2e-6
    assert found[name]["micro_batches"] == micro_batches
    expected, val_loss = found[name]["val_loss"]
    assert val_loss == pytest.approx(expected, rel=2e-6)


def test_what_replicas_cannot_share_is_refused_with_the_remedy(found):
    assert "cannot share an element" in found["rest"]["error"]
    assert "drop_remainder=True" in found["rest"]["error"]
    assert found["rest"]["updates"] == 7
    assert "the elements of this dataset cannot be cut" in found["graphs"]["error"]
    assert found["graphs"]["updates"] == 0
