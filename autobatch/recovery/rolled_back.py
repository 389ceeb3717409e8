"""Signal from the step that was undone to its repetition."""

from __future__ import annotations

from autobatch.memory import oom


class RolledBackError(Exception):
    """Signal of a step that ran out of memory and was undone.

    It is raised outside of the handler of the original error, whose traceback would keep the failed tensors alive.
    """

    def __init__(
        self,
        micro_batch: int,
        samples: int,
        diagnosis: oom.Diagnosis,
        *,
        length_ratio: float = 1.0,
        beside_copies: bool = False,
    ) -> None:
        super().__init__(diagnosis.detail)
        self.micro_batch = micro_batch
        self.samples = samples
        self.diagnosis = diagnosis
        self.length_ratio = length_ratio
        self.beside_copies = beside_copies
