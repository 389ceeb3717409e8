"""In a real kernel: what a notebook gets to see of ``fit`` and ``tune``, and the stop button."""

from __future__ import annotations

import pytest
from kernel_session import KernelSession

PREPARE = """
import autobatch
autobatch.limit_memory("200MiB")
import keras, numpy as np, tensorflow as tf

class Slow(keras.layers.Layer):
    def call(self, x):
        busy = tf.while_loop(lambda i, _: i < 4, lambda i, m: (i + 1, tf.tanh(m @ m)), (0, tf.ones((1024, 1024))))[1]
        return x + 0.0 * tf.stop_gradient(busy[0, 0])

def build(*more):
    keras.utils.set_random_seed(0)
    stack = [keras.Input((512,)), keras.layers.Dense(512, activation="relu"), *more, keras.layers.Dense(8)]
    model = keras.Sequential(stack)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model

model = build()
x, y = np.ones((4096, 512), "float32"), np.ones((4096, 8), "float32")
weights = lambda: [v.numpy().tobytes() for v in (*model.variables, *model.optimizer.variables)]
"""


def in_the_second_trial(shown):
    return any("<table" in html and "Trying" in html for html in shown.html())


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    session = KernelSession(tmp_path_factory.mktemp("ipython"))
    prepared = session.run(PREPARE)
    assert not prepared.of("error"), prepared.error()
    yield session
    session.close()


@pytest.mark.slow
class TestInAKernel:
    def test_a_search_is_shown_while_it_runs(self, kernel):
        # 4,096 samples certainly do not fit: what the wide layer makes of them is 32 MiB in one piece. Exact, for the
        # first trial may be of the largest useful size already.
        shown = kernel.run(
            "wide = keras.Sequential([keras.Input((16,)), keras.layers.Dense(2048, 'relu'), keras.layers.Dense(8)])\n"
            "wide.compile('adam', 'mse')\n"
            "report = autobatch.tune(wide, x[:, :16], y, target_batch=4096, memory_limit='24MiB', exact=True); report"
        )
        (first,) = shown.html("display_data")
        updates = shown.html("update_display_data")
        assert "Tracing the step" in first
        assert "<table" not in first
        assert any("Trying micro-batch" in update for update in updates)
        # Each trial that has ended stands in the table while the next one runs.
        rows = [update.count('<td class="number">') // 3 for update in updates if "Trying" in update]
        assert rows == sorted(rows)
        assert rows[-1] >= 1
        assert "<summary>Plan: effective batch 4,096 = " in updates[-1]
        assert "Trying" not in updates[-1]
        ids = {c["transient"]["display_id"] for m, c in shown.messages if "display_data" in m}
        assert len(ids) == 1
        # Nobody has loaded the extension: the report is HTML from the first use of autobatch on.
        (report,) = shown.html("execute_result")
        assert "autobatch sizing report" in report

    def test_fit_shows_its_search_unless_it_is_silent(self, kernel):
        shown = kernel.run("history = autobatch.fit(model, x[:64], y[:64], target_batch=64, verbose=2)")
        assert "<summary>Plan: effective batch 64 " in shown.html()[-1]
        assert "loss" in shown.text()
        silent = kernel.run("history = autobatch.fit(model, x[:64], y[:64], target_batch=64, verbose=0)")
        assert not silent.html()
        assert not silent.text()
        (plan,) = kernel.run("history.plan").html()
        assert plan == "<div><b>Plan</b>: effective batch 64 in one micro-batch, nothing to accumulate</div>"

    def test_progress_can_be_turned_off(self, kernel):
        kernel.run("from autobatch.notebook import show_progress; show_progress(False)")
        shown = kernel.run("plan = autobatch.tune(model, x, y, target_batch=8).plan")
        kernel.run("show_progress(True)")
        assert not shown.messages

    def test_the_stop_button_leaves_the_model_as_it_was(self, kernel):
        kernel.run("model = build(Slow()); before = weights()")
        shown = kernel.run("autobatch.tune(model, x, y, target_batch=4096)", interrupt_at=in_the_second_trial)
        assert shown.error()["ename"] == "KeyboardInterrupt"
        assert "<summary>Interrupted" in shown.html()[-1]
        assert kernel.run("print(weights() == before)").text() == "True\n"

    def test_the_magic(self, kernel):
        assert not kernel.run("%load_ext autobatch\nmodel = build()").of("error")
        kernel.run("before = weights()")
        shown = kernel.run("%autobatch model (x, y) --target-batch 64")
        reports = [html for html in shown.html() if "autobatch sizing report" in html]
        assert len(reports) == 1  # shown by the magic, and not once more as the cell's value
        assert kernel.run("print(type(_).__name__, _.plan.effective_batch)").text() == "Report 64\n"
        kept = kernel.run("kept = %autobatch model x y --target-batch 64")
        assert sum("autobatch sizing report" in html for html in kept.html()) == 1
        (again,) = kernel.run("kept").html()
        assert "autobatch sizing report" in again
        quiet = kernel.run("kept = %autobatch model x y --target-batch 64 --quiet")
        assert not quiet.html()
        assert kernel.run("print(weights() == before)").text() == "True\n"

    def test_the_magic_stopped(self, kernel):
        kernel.run("model = build(Slow())")
        shown = kernel.run("%autobatch model (x, y) --target-batch 4096", interrupt_at=in_the_second_trial)
        assert shown.error()["traceback"] == ["KeyboardInterrupt: the search was stopped; the model is as it was."]

    def test_unloaded_it_shows_nothing(self, kernel):
        kernel.run("%load_ext autobatch")
        kernel.run("%unload_ext autobatch")
        shown = kernel.run("autobatch.tune(model, x, y, target_batch=8)")
        assert not shown.html()
        assert shown.of("execute_result")[0]["data"]["text/plain"].startswith("Report(")
        assert "not found" in kernel.run("%autobatch model x").text("stderr")
