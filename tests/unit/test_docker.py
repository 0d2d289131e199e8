"""What hadolint does not know of the Dockerfile."""

import json
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from mtp_dist.config import load_config

PROJECT = Path(__file__).resolve().parents[2]
DOCKERFILE = (PROJECT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")


def test_the_health_check_can_run() -> None:
    [command] = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    program, subcommand, option, config, *overrides = json.loads(command)
    assert (program, subcommand, option) == ("mtp-dist", "selfcheck", "--config")
    [home] = re.findall(r"^WORKDIR (/opt/.*)$", DOCKERFILE, re.MULTILINE)
    settings = load_config(PROJECT / Path(config).relative_to(home), overrides)
    assert settings.micro_batches(world_size=1) and settings.run.device == "cpu"


def test_nobody_is_root() -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["10001"]


def test_versions_are_exact_and_allowed() -> None:
    lines = (PROJECT / "docker" / "constraints.txt").read_text().splitlines()
    pins = {pin.name: pin.specifier for pin in (Requirement(line) for line in lines if not line.startswith("#"))}
    assert all(re.fullmatch(r"==[\d.]+", str(specifier)) for specifier in pins.values())
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    assert pins.keys() <= wanted.keys()
    for name, specifier in pins.items():
        assert wanted[name].specifier.contains(str(specifier).removeprefix("==")), name
    assert re.search(r"^FROM \S+:\d\d\.\d\d-py3$", DOCKERFILE, re.MULTILINE)
