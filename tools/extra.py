"""The optional packages of the tools: requirements-extra.txt, which `make extra` installs."""

import importlib
import re
from pathlib import Path
from types import ModuleType

from training.errors import UserError, short_reason

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements-extra.txt"
PIP_NAMES = {"pytorch_grad_cam": "grad-cam"}  # of modules that are called otherwise than their packages


def need(module: str) -> ModuleType:
    """Import an optional module; raise UserError with the command that installs it if it is missing or broken."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        name = PIP_NAMES.get(package, package)
        broken = getattr(error, "name", None) != package
        what = f"cannot import {module} [{short_reason(error, 120)}]" if broken else "an optional package is missing"
        advice = f"run make extra, or pip install {name}=={version(name)}"
        raise UserError(f"{what} ({name}): {advice}") from error


def version(name: str) -> str:
    """Return the version of a package that requirements-extra.txt asks for."""
    return re.search(rf"^{re.escape(name)}==(\S+)", REQUIREMENTS.read_text(), re.M)[1]
