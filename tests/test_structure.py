"""What keeps the package readable: short functions, files by subject, folders of a size, one meaning for a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path
from statistics import median

import adi

SOURCE = Path(adi.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FUNCTION_LINES, FILE_LINES, FOLDER_FILES, MEDIAN_LINES, PACKAGE_LINES = 60, 500, 15, 8, 34_318


def functions() -> dict[str, int]:
    """Every function and method with its lines."""
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                found[f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    return found


def test_functions_are_short() -> None:
    lines = functions()
    assert not {name: n for name, n in lines.items() if n > FUNCTION_LINES}
    assert median(lines.values()) <= MEDIAN_LINES


def test_files_and_folders_are_by_subject() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert not {str(path.relative_to(SOURCE)): n for path, n in lines.items() if n > FILE_LINES}
    assert sum(lines.values()) <= PACKAGE_LINES
    folders = defaultdict(list)
    for path in FILES:
        folders[path.parent].append(path.name)
    assert not {str(folder.relative_to(SOURCE)): len(names) for folder, names in folders.items() if len(names) > FOLDER_FILES}


def test_no_two_public_classes_share_a_name() -> None:
    places = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(SOURCE)))
    assert not {name: files for name, files in places.items() if len(files) > 1}
