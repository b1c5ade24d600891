"""The build backend: scikit-build-core's, told whether this Python can have the extension module fastvae._calls.

The module is in CPython's limited API, so that one wheel, cp310-abi3, serves all versions. It takes Python.h, and a
CPython with the global interpreter lock; elsewhere the package is built without it, as a wheel py3-none. pyproject.toml
reads the variable FASTVAE_PYTHON_INCLUDE, which is set here.
"""

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from scikit_build_core import build as scikit_build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _look_for_python_h(config_settings)
    return scikit_build.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _look_for_python_h(config_settings)
    return scikit_build.build_editable(wheel_directory, config_settings, metadata_directory)


def _look_for_python_h(config_settings: Any) -> None:
    include = Path(sysconfig.get_path("include"))
    usual = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
    pure = str((config_settings or {}).get("wheel.cmake", "")).lower() in ("false", "0", "off")
    if usual and not pure and sys.platform != "win32" and (include / "Python.h").is_file():
        os.environ.setdefault("FASTVAE_PYTHON_INCLUDE", str(include))
