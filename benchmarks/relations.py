"""Count the relations between the parts of the package: `python -m benchmarks.relations [CHECKOUT]`.

A part is a folder or file directly in `clipjax/`; a relation is a pair of parts of which one imports the other,
anywhere in its code.
"""

import ast
import pathlib
import sys


def relations(package: pathlib.Path) -> set[tuple[str, str]]:
    parts = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    found = set()
    for path in package.rglob("*.py"):
        part = path.relative_to(package).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            split = [name.split(".") for name in names]
            found |= {(part, name[1]) for name in split if name[0] == "clipjax" and len(name) > 1}
    return {(part, other) for part, other in found if other in parts and other != part}


if __name__ == "__main__":
    checkout = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    found = relations(checkout / "clipjax")
    print(f"{len(list((checkout / 'clipjax').glob('*.py')))} files at the top, {len(found)} relations")
    mutual = sorted({(min(pair), max(pair)) for pair in found if pair[::-1] in found})
    print("circles of two:", ", ".join(" <-> ".join(pair) for pair in mutual) or "none")
