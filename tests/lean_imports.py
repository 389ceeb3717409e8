"""Imported before Keras by what tests run in processes of their own: spares each 1.2 of 4 s of the processor.

Keras imports these packages wherever they are installed. None of the trainings that import this module needs one.
"""

import sys

sys.modules.update(dict.fromkeys(("IPython", "pandas", "sklearn")))
