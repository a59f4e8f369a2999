"""The rules of the house that no linter knows."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "adamax"
PYTHON = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted((PACKAGE / "_native").glob("*pp"))
MOST_LINES = 400


def name_of(path):
    return str(path.relative_to(PACKAGE))


def lines_of_code(path):
    """Those with more on them than comments, docstrings and blanks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        lines = (line.strip() for line in text.splitlines())
        return sum(bool(line) and not line.startswith("//") for line in lines)
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    ignored = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in ignored:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=name_of)
def test_files_are_short(path):
    assert lines_of_code(path) <= MOST_LINES


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_no_private_name_is_imported_from_another_module(path):
    """But from a framework, which _compat.py of each front end alone may do."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or path.name == "_compat.py":
            continue
        module = node.module or ""
        private = [alias.name for alias in node.names if alias.name.startswith("_")]
        own = node.level > 0 or module.startswith("adamax")
        # Modules may be private, and imported where they are known.
        modules = {file.stem for file in path.parent.iterdir()}
        assert not private or (own and set(private) <= modules), private
        if not own:
            assert not any(part.startswith("_") for part in module.split(".")), module


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_nothing_is_caught_silently(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (
                isinstance(node.type, ast.Name)
                and node.type.id in ("Exception", "BaseException")
            )
            swallows = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (broad and swallows), f"line {node.lineno}"
