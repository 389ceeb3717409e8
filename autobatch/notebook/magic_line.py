"""Parser of the line after ``%autobatch``: Python expressions, and options like those of a command line.

This module knows nothing of IPython.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

FILE_NAME = "<%autobatch>"
"""File name of the line in tracebacks."""

_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "'\""


class LineError(Exception):
    """The error for a line that cannot be used, with a message of one line."""


def split(line: str) -> list[str]:
    """Cut ``line`` at spaces outside brackets and strings: ``"model (x, y)"`` gives ``["model", "(x, y)"]``.

    A comment is cut off.

    Raises:
        LineError: a bracket or a string is not closed.
    """
    parts: list[str] = []
    part = ""
    depth = 0
    quote = ""
    position = 0
    while position < len(line):
        character = line[position]
        position += 1
        if quote:
            if character == "\\":
                character += line[position : position + 1]
                position += 1
            elif character == quote:
                quote = ""
        elif character in _QUOTES:
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth = max(0, depth - 1)  # Python will complain of one too many
        elif not depth and character.isspace():
            if part:
                parts.append(part)
            part = ""
            continue
        elif not depth and not part and character == "#":
            break
        part += character
    if quote or depth > 0:
        raise LineError(f"A {'string' if quote else 'bracket'} is never closed. Received: {part!r}")
    return [*parts, part] if part else parts


def with_values(parts: list[str], names: Mapping[str, Any]) -> list[str]:
    """Return ``parts`` with the options' values read like IPython's: ``"512 MiB"``, ``{n * 2}``, ``$n``.

    Expressions that are no option's value, a dictionary among them, are left unchanged.
    """
    read = []
    after_option = False
    for part in parts:
        name, equals, value = part.partition("=")
        is_option = part.startswith("--")
        if is_option and equals:
            part = f"{name}={_value(value, names)}"
        elif after_option and not is_option:
            part = _value(part, names)
        read.append(part)
        after_option = is_option and not equals
    return read


def _value(text: str, names: Mapping[str, Any]) -> str:
    if text[:1] == "$" and text[1:].isidentifier():
        return str(evaluate(text[1:], names))
    try:
        if text[:1] == "{" and text[-1:] == "}":
            ast.parse(text[1:-1].strip(), mode="eval")
        elif text[:1] in _QUOTES:
            return str(ast.literal_eval(text))
        else:
            return text
    except (SyntaxError, ValueError):
        return text  # a dictionary after a flag; argparse complains of anything else
    return str(evaluate(text[1:-1].strip(), names))


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """Evaluate a Python expression and return its value; exceptions of the code that it calls are passed on.

    Raises:
        LineError: it is no expression, or a name in it is not defined.
    """
    try:
        code = compile(text, FILE_NAME, "eval")
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise LineError(f"This is no Python expression: {reason}. Received: {text!r}") from None
    try:
        return eval(code, dict(names))
    except NameError as error:
        traceback = error.__traceback__
        if traceback is None or traceback.tb_next is None or traceback.tb_next.tb_next is not None:
            raise  # from code that the expression has called
        raise LineError(f"{error}. Received: {text!r}") from None
