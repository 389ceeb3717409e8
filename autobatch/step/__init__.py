"""The accumulated step, compiled. It divides, weighs, sums and updates; it does not handle running out of memory.

Each module has one thing to know:

* ``division``: the sizes of an effective batch's micro-batches.
* ``micro_step``: one micro-batch through the user's ``train_step`` or ``test_step``, with whatever is replaced.
* ``micro_batch_loop``: the loop over micro-batches, inside of TensorFlow.
* ``accumulators``: the sums of gradients on one device; ``embedding_rows`` where rows are kept in their place.
* ``update_room``: the memory of the update, asked for before it begins.
* ``whole_batch_step``: Keras's own step, where one micro-batch is the whole effective batch.
* ``compiled_step``: the promises of a step, whether on one device or on several.
* ``fixed_size``: code that works with one number of samples alone.
* ``kept_steps``: which traces the next training of the same model may use.
* ``accumulated_step``: all of it put together on one device; :mod:`autobatch.replicas.step` does so on several.
"""
