"""A training on several replicas that is killed ends with the bits of one that was not; see ``killed_fits.py``."""

import json

import killed_fits
import nursery
import optional
import pytest


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    optional.several_devices()
    folder = tmp_path_factory.mktemp("killed")
    done = nursery.run(killed_fits.__file__, folder, *killed_fits.ON_REPLICAS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", killed_fits.ON_REPLICAS)
def test_replicas_go_on_each_with_values_of_its_own(results, name):
    whole, resumed, killed = (results[name][part] for part in ("whole", "resumed", "killed"))
    assert [set(each) for each in killed] == [{"signal"}] * len(killed)
    for what in ("digest", "history", "epochs", "numbers"):
        assert resumed.get(what) == whole.get(what), resumed.get("error", what)
    assert resumed["digest"]
    assert resumed["left"] == []


def test_what_is_alike_on_all_replicas_is_kept_once(results):
    copies = [name for name in results["tf.data on three"]["names"] if "/replica" in name]
    own = [name.partition("/replica")[0] for name in copies]
    assert sorted(set(own)) == ["count", "loss/count", "loss/total", "total"]
