"""The user's functions, named by dotted path (`mypackage.models:build`): found, imported, and the file's digest.

The current folder is searched first, as `python -m` does.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.common.errors import UsageError
from pipeline.common.files import file_sha256

_imported: dict[str, str | None] = {}
"""The digest of each module that `import_function` imported, taken just before: a file that is edited later is not the
code in use."""


def source_file(path: str) -> Path | None:
    """The Python file of the module of a dotted path, which is not imported; None if there is none."""
    parts = path.partition(":")[0].split(".")
    for folder in [os.getcwd(), *sys.path]:
        package = Path(folder or ".", *parts)
        for file in (package / "__init__.py", package.with_name(f"{parts[-1]}.py")):
            if file.is_file():
                return file.resolve()
    return None


def source_digest(path: str) -> str | None:
    """SHA-256 of that file, as it was when the module was imported; None if there is none.

    It covers neither what the module imports nor data that it reads.
    """
    module = path.partition(":")[0]
    if module in _imported:
        return _imported[module]
    file = source_file(path)
    return file_sha256(file) if file else None


def import_function(path: str, what: str) -> Callable[..., Any]:
    """Import the function of a dotted path.

    Args:
        what: what names it, for messages.

    Raises:
        UsageError: there is no such module in a Python file, it cannot be imported, or has no such function.
    """
    module, _, name = path.partition(":")
    file, folder = source_file(path), os.getcwd()
    if file is None:
        raise UsageError(
            f"{what} {path!r}",
            expected=f"a Python file of the module {module}, in the current folder or installed",
            found=f"none in {folder} or on Python's path",
            do="correct the path, or start the command in the folder that holds the module",
        )
    if module not in _imported:
        _imported[module] = file_sha256(file)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()  # the file may be newer than Python's listing of its folder
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # whatever its code raises
        del _imported[module]
        raise UsageError(
            f"{what} {path!r}",
            expected=f"a module that can be imported: {file}",
            found=f"{type(error).__name__}: {error}",
            do="correct the module",
        ) from error
    function, origin = getattr(loaded, name, None), Path(str(getattr(loaded, "__file__", ""))).resolve()
    if not callable(function) or origin != file:
        raise UsageError(
            f"{what} {path!r}",
            expected=f"a function {name} in {file}",
            found="another module of this name" if origin != file else f"{function!r}",
            do="correct the name" + (f": Python imports {origin}" if origin != file else ""),
        )
    return function
