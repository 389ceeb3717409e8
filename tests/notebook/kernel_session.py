"""A real IPython kernel that a test talks to as a notebook does."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty

from jupyter_client.manager import start_new_kernel

import autobatch

ROOT = Path(autobatch.__file__).parents[1]


@dataclass
class Shown:
    """What one cell has put out, in order, each as ``(message type, content)``."""

    messages: list = field(default_factory=list)

    def of(self, kind):
        return [content for message, content in self.messages if message == kind]

    def html(self, *kinds):
        kinds = kinds or ("display_data", "update_display_data", "execute_result")
        return [c["data"]["text/html"] for m, c in self.messages if m in kinds and "text/html" in c["data"]]

    def text(self, stream="stdout"):
        return "".join(content["text"] for content in self.of("stream") if content["name"] == stream)

    def error(self):
        (content,) = self.of("error")
        return content


class KernelSession:
    def __init__(self, ipython_folder):
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "IPYTHONDIR": str(ipython_folder)}
        self.manager, self.client = start_new_kernel(kernel_name="python3", env=environment)

    def run(self, code, *, interrupt_at=None):
        """Execute a cell; interrupt it, as the stop button does, once ``interrupt_at(shown)`` is true."""
        shown = Shown()
        request = self.client.execute(code, store_history=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                message = self.client.get_iopub_msg(timeout=5)
            except Empty:
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return shown
            if kind not in ("status", "execute_input"):
                shown.messages.append((kind, content))
            if interrupt_at is not None and interrupt_at(shown):
                self.manager.interrupt_kernel()
                interrupt_at = None
        raise TimeoutError(f"the kernel is still busy with {code!r}")

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
