"""Imported by Python at the start of each process that the fixture ``lean_children`` reaches.

Keras imports three packages wherever they are installed, which costs 1.2 of 4 s of the processor. Here it does not find
them. Whatever else imports one, finds it.
"""

import sys

_PACKAGES = {"IPython", "pandas", "sklearn"}


class _NotForKeras:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in _PACKAGES:
            frame = sys._getframe(1)
            while frame is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
                frame = frame.f_back
            if frame is not None and frame.f_globals.get("__name__", "").startswith("keras."):
                raise ModuleNotFoundError(f"No module named {name!r} for Keras", name=name)


sys.meta_path.insert(0, _NotForKeras)
