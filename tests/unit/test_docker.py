"""Rules for the Dockerfile that hadolint does not check."""

import re
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[2]
DOCKERFILE = (PROJECT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")


def test_no_health_check_and_no_root():
    """A health check would take memory and time from it."""
    assert "HEALTHCHECK" not in DOCKERFILE
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["10001"]


def test_build_context_is_what_is_copied():
    ignored, *kept = (PROJECT / ".dockerignore").read_text().split()
    copied = [name for names in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in names.split()]
    assert ignored == "*" and sorted(kept) == sorted([*(f"!{name}" for name in copied), "**/__pycache__"])


def requirements():
    """Return the project's requirements, and the versions of the packages in the image."""
    lines = (PROJECT / "docker" / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch("==[^=*,]+", str(pin.specifier)) for pin in pins), pins
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    return [Requirement(text) for text in project["dependencies"]], versions


def test_every_version_is_pinned():
    """The tag of the image pins PyTorch and setuptools."""
    wanted, versions = requirements()
    missing = {canonicalize_name(requirement.name) for requirement in wanted} - versions.keys()
    for name in versions:
        with suppress(PackageNotFoundError):
            # The requirements of another version may differ.
            if version(name) == versions[name]:
                needed = [Requirement(text) for text in requires(name) or []]
                here = [need.name for need in needed if not need.marker or need.marker.evaluate({"extra": ""})]
                missing |= {canonicalize_name(need) for need in here} - versions.keys()
    assert missing <= {"torch", "setuptools"}
    assert re.search(r"^FROM \S+:\d\d\.\d\d-py3$", DOCKERFILE, re.MULTILINE)


def test_pinned_versions_are_allowed():
    wanted, versions = requirements()
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name not in versions or requirement.specifier.contains(versions[name]), name
