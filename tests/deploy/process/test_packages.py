"""deploy/process/packages.py: the four packages are ours."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from deploy.process import packages
from deploy.process.packages import PACKAGES, PackageCollision, check_packages


def test_our_packages_lie_together():
    check_packages()


def test_another_distribution_s_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ours = {name: tmp_path / "ours" / name / "__init__.py" for name in PACKAGES}
    origins = ours | {"graph": tmp_path / "site-packages" / "graph" / "__init__.py"}
    monkeypatch.setattr(packages, "find_spec", lambda name: ModuleSpec(name, None, origin=str(origins[name])))
    with pytest.raises(PackageCollision, match=rf"'graph' comes from {tmp_path}/site-packages; uninstall"):
        check_packages()


def test_a_package_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    specs = {name: ModuleSpec(name, None, origin=str(tmp_path / name / "__init__.py")) for name in PACKAGES}
    monkeypatch.setattr(packages, "find_spec", lambda name: (specs | {"stages": None})[name])
    with pytest.raises(PackageCollision, match="'stages' comes from None"):
        check_packages()
