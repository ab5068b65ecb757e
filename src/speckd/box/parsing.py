"""Syntax trees of text that others wrote."""

import ast
import warnings


def parsed(text: str) -> ast.Module:
    """The tree; Python's advice about the text is for who wrote it, and is not shown.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: it is no Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text.replace("\r\n", "\n"))
