"""The files that a saved model of an uncommon shape takes along: a short modelling file, and what it is built with."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.portable import parts, portable_classes
from foveate.version import __version__

AUTO_MAP = {"AutoConfig": "modeling_thin.ThinConfig", "AutoModelForCausalLM": "modeling_thin.ThinForCausalLM"}
"""Where transformers finds the classes, as config.json tells it."""

_CODE = '''"""A {model} whose parts differ in shape, as config.json says under "thin". Written by foveate {version}.

Open it with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True): torch and transformers are enough.
"""

from transformers import {config}, {model}

{imports}


class ThinConfig({config}):
    model_type = "{kind}"

    def validate(self):
        """The stock architecture's rules for sizes do not hold here."""


class ThinForCausalLM(Thin, {model}):
    config_class = ThinConfig
    portable = {{{portable}}}
'''


def write_code(folder: Path, config: Any, stock_model: type) -> None:
    """Write the modelling file, and copies of the portable files that it needs.

    Transformers copies relative imports along only where they are plain lines `from .file import name`.

    Args:
        folder: where config.json lies.
        config: of the type `thin_...`; `config.thin` says which portable classes are used.
        stock_model: the stock class.
    """
    known = portable_classes()
    used = sorted({name for name, _ in config.thin["modules"].values()} - {"resized"})
    by_file: dict[str, list[str]] = {str(parts.__file__): ["Thin"]}
    for name in used:
        by_file.setdefault(str(inspect.getsourcefile(known[name])), []).append(name)
    files: dict[str, Path] = {}
    for file in by_file:
        _gather(Path(file), files)
    for name, path in files.items():
        shutil.copyfile(path, folder / f"{name}.py")
    code = _CODE.format(
        model=stock_model.__name__,
        config=type(config).__mro__[1].__name__,
        kind=config.model_type,
        version=__version__,
        imports="\n".join(f"from .{Path(file).stem} import {', '.join(names)}" for file, names in by_file.items()),
        portable=", ".join(f'"{name}": {name}' for name in used),
    )
    (folder / "modeling_thin.py").write_text(code, encoding="utf-8")


def _gather(file: Path, files: dict[str, Path]) -> None:
    """Note a portable file, and its neighbours that it imports."""
    if files.setdefault(file.stem, file) != file or file.stem == "modeling_thin":
        raise FoveateError(
            f"{file} can't go into the model's folder, where {files[file.stem]} has its name: rename the file of "
            "portable modules."
        )
    for name in re.findall(r"^\s*from\s+\.(\w+)\s+import", file.read_text(encoding="utf-8"), re.MULTILINE):
        if name not in files:
            _gather(file.with_name(f"{name}.py"), files)
