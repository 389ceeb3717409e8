"""Functions that are run each in a fork of this process, made before TensorFlow has started anything.

Each may limit memory for itself. Importing TensorFlow takes longer than most of them, and is done once.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback


def told_by(function):
    """Run ``function`` in a fork of its own; return what it returns, which must be plain data.

    Raises:
        RuntimeError: The fork died, or the function raised: standard error says what.
    """
    gc.freeze()  # a search collects several times: not all that was imported as well
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            text = json.dumps(function())
            os.close(reading)
            with os.fdopen(writing, "w") as pipe:
                pipe.write(text)
            code = 0
        except BaseException:  # noqa: BLE001 - a fork must never return into what its parent does
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"{function.__name__} ended with code {os.waitstatus_to_exitcode(status)}")
    return json.loads(text)
