"""Results to remember, made by hand, and a process that remembers them until it is killed.

``python remembered.py FOLDER NAME COUNT`` prints each digest once the store says that it is on the disk.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from autobatch.cache import store as store_module
from autobatch.cache.entry import Remembered
from autobatch.cache.key import Key
from autobatch.records import MemoryModel

LIMIT = 100 * 2**20


def a_key(digest="a", limit_bytes=LIMIT, exact=False):
    return Key(digest, limit_bytes, exact)


def a_result(micro_batch=16, **fields):
    fields = {
        "largest_fit": max(16, micro_batch),
        "smallest_failure": None,
        "is_bound": True,
        "limit_bytes": LIMIT,
        "peak_bytes": 80 * 2**20,
        "memory_model": MemoryModel(1e6, 5e6),
        "target_batch": None,
        "model_name": "model",
        "device": "CPU:0",
        "stopped_because": "16 fits and 17 does not: within 3 %",
        "created_seconds": 1.7e9,
        **fields,
    }
    return Remembered(micro_batch, **fields)


def main():
    folder, name, count = sys.argv[1:]
    store_module.MOST_RESULTS = 10**6  # every row is to be found again
    store = store_module.ResultStore(Path(folder))
    for number in range(int(count)):
        digest = f"{name}-{number}"
        if store.put(a_key(digest), a_result(1 + number % 100, largest_fit=100)):
            print(digest, flush=True)
        time.sleep(random.random() * 0.02)  # SQLite's lock is not a queue: without a pause the same one gets it again


if __name__ == "__main__":
    main()
