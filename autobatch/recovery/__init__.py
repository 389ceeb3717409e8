"""Steps as transactions: each is undone after running out of memory, and run again in smaller micro-batches.

Each module has one thing to know:

* ``out_of_memory``: the exceptions to look at, and which of them are about memory.
* ``keeper``: the values that a step is undone with, and the place where they are kept.
* ``transaction``: one step on one device, done whole or undone; :mod:`autobatch.replicas.transaction` on several.
* ``abstract_transaction``: the attempts at a step, until one is done or nothing fits.
* ``micro_batch_policy``: the next size, after a failure and after many good steps.
* ``sample_lengths``: the size for samples that are shorter or longer than those of the search.
"""
