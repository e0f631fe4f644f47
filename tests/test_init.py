"""The package's front door: quick to open, every public name behind it, verbs that are functions."""

from __future__ import annotations

import subprocess
import sys

import foveate as fv


def test_every_public_name_resolves():
    for name in fv.__all__:
        assert getattr(fv, name) is not None
    assert set(fv.__all__) <= set(dir(fv))


def test_verbs_are_functions_whatever_was_imported_before():
    import foveate.compare
    import foveate.verify  # noqa: F401

    assert fv.compare.__name__ == "compare" and callable(fv.compare) and callable(fv.verify)


def test_importing_is_quick_and_imports_no_torch():
    code = "import sys, foveate, foveate.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
