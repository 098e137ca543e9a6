"""torch.compile, with a check for the C compiler and Python headers that it needs."""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import cast

import torch
from torch import nn

from pipeline.common.errors import UsageError


def compile_model(model: nn.Module) -> nn.Module:
    """Compile a model.

    Raises:
        UsageError: there is no C compiler or no headers, which torch would notice only in the first forward pass.
    """
    compilers = [name for name in (os.environ.get("CC"), os.environ.get("CXX"), "gcc", "g++", "clang") if name]
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    lacking = [] if any(map(shutil.which, compilers)) else [f"none of {', '.join(compilers)}"]
    if not headers.exists():
        lacking.append(f"no {headers}")
    if lacking:
        raise UsageError(
            "compile: true",
            expected="a C compiler and Python's headers, which torch.compile needs",
            found="; ".join(lacking),
            do="install them (on Debian gcc, g++ and python3-dev), or set compile to false",
        )
    return cast(nn.Module, torch.compile(model))
