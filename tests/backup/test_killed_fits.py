"""A training whose process is killed ends with the bits of one that was not; see ``killed_fits.py``."""

import json
import signal

import killed_fits
import nursery
import pytest


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    done = nursery.run(killed_fits.__file__, folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", killed_fits.CASES)
def test_a_killed_training_ends_as_one_that_was_not(results, name):
    whole, resumed, killed = (results[name][part] for part in ("whole", "resumed", "killed"))
    assert [set(each) for each in killed] == [{"signal"}] * len(killed)
    for what in ("digest", "history", "epochs", "numbers", "log"):
        assert resumed.get(what) == whole.get(what), resumed.get("error", what)
    assert resumed["digest"]
    assert resumed["left"] == []


@pytest.mark.parametrize("name", killed_fits.CASES)
def test_two_backups_are_kept_meanwhile(results, name):
    whole = [name for name in results[name]["kept"] if name.startswith("update-")]
    assert 1 <= len(whole) <= 3  # the third is not removed yet if the process dies just then


def test_a_signal_to_end_is_passed_on_and_the_update_under_way_is_kept(results):
    assert [each["signal"] for each in results["tf.data"]["killed"]] == [signal.SIGKILL, signal.SIGTERM]
    # Behind the third or the sixth update, whichever was written in time, it came in the fourth of its process.
    assert {"update-000000000007", "update-000000000010"} & set(results["tf.data"]["kept"])
    assert results["callbacks"]["killed"][1]["signal"] == signal.SIGTERM
