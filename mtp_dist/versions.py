"""Versions of the packages that a run depends on."""

from importlib.metadata import PackageNotFoundError, version


def installed_versions() -> dict[str, str | None]:
    """Return the version of each package; None for one that is not installed, such as a plain checkout."""
    versions: dict[str, str | None] = {}
    for package in ("mtp-dist", "torch", "deepspeed", "megatron-core"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions
