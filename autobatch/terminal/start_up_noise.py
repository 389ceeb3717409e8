"""Lines that TensorFlow writes when it starts, whatever the program: no use where a worker's last words are shown."""

from __future__ import annotations

import re

_NOISE = re.compile(
    r"WARNING: All log messages before absl::InitializeLog\(\) is called.*"
    r"|To enable the following instructions: .*rebuild TensorFlow with the appropriate compiler flags\."
    r"|.*\b(?:cudart_stub|cpu_feature_guard)\.cc:\d+\] .*"
    r"|.*\.cc:\d+\] (?:oneDNN custom operations are on\.|Unable to register cu\w+ (?:factory|plugin)|TF-TRT Warning"
    r"|failed call to cuInit|computation placer already registered|Could not find cuda drivers|Memory patch applied).*"
)


def without_start_up_noise(text: str) -> str:
    """Return ``text`` without the lines that TensorFlow writes when it starts."""
    return "".join(line for line in text.splitlines(keepends=True) if not _NOISE.fullmatch(line.rstrip("\n")))
