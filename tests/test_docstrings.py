"""Docstrings stand alone: they continue neither a name nor a question, and a function's begins with a verb."""

import ast
import pathlib

import pytest

import clipjax

PACKAGE = pathlib.Path(clipjax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
CONTINUATIONS = {"What", "How", "Of", "Whether", "Where", "Which", "From"}
PROPERTIES = {"property", "functools.cached_property"}


def faults(source: str) -> list[str]:
    """Name every docstring that breaks a rule, and the rule."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = (ast.get_docstring(node) or "A").split()[0].rstrip(".,:;")
        name = getattr(node, "name", "module")
        if first in CONTINUATIONS:
            found.append(f"{name}: begins with {first}")
        if isinstance(node, ast.FunctionDef) and not is_property(node) and is_third_person_or_plural(first):
            found.append(f"{name}: begins with {first}, no imperative verb")
    return found


def is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) in PROPERTIES for decorator in node.decorator_list)


def is_third_person_or_plural(word: str) -> bool:
    """Return true for "Returns" and "Bytes", false for "Return" and "Pass": no imperative ends with a single s."""
    return word.endswith("s") and not word.endswith("ss")


def test_docstrings_begin_as_they_should():
    found = [f"{path.relative_to(PACKAGE)}: {fault}" for path in FILES for fault in faults(path.read_text())]
    assert not found, "\n".join(found)


def docstring(text: str, head: str = "def f():") -> str:
    return f'"""Module."""\n\n\n{head}\n    """{text}"""\n'


@pytest.mark.parametrize("text", ["What it is.", "Whether it fits.", "Of a leaf.", "From a config."])
@pytest.mark.parametrize("head", ["def f():", "class C:"])
def test_a_continuation_is_refused(text, head):
    (fault,) = faults(docstring(text, head))
    assert "begins with" in fault


@pytest.mark.parametrize("text", ["Returns it.", "Reads a file.", "Gives the sum.", "Bytes of the result."])
def test_a_function_without_an_imperative_is_refused(text):
    assert faults(docstring(text)) == [f"f: begins with {text.split()[0]}, no imperative verb"]
    assert not faults(docstring(text, "class C:"))


def test_a_module_that_continues_is_refused():
    assert faults('"""How it works."""\n') == ["module: begins with How"]


@pytest.mark.parametrize("text", ["Return it.", "Pass it on.", "`b` bytes."])
def test_what_is_right_passes(text):
    assert not faults(docstring(text))


def test_a_property_may_be_a_noun():
    source = 'class C:\n    """A class."""\n\n    @property\n    def size(self):\n        """Bytes of all."""\n'
    assert not faults(source)
