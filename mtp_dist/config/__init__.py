"""The typed configuration of a run: one YAML file plus `section.key=value` overrides.

Everything that can be checked without starting a process is checked here, so that an invalid configuration is
rejected before any rank does work.
"""

from mtp_dist.config.base import DeviceMemory, DeviceType, Section
from mtp_dist.config.heads import HeadsConfig
from mtp_dist.config.loader import build_config, load_config, override_values, read_values
from mtp_dist.config.low_rank import LowRankConfig
from mtp_dist.config.migration import config_to_save, saved_config
from mtp_dist.config.model import ModelConfig
from mtp_dist.config.resolve import resolve, with_device_memory
from mtp_dist.config.rope import RopeScalingConfig
from mtp_dist.config.schema import Config, SourceConfig

__all__ = [
    "Config",
    "DeviceMemory",
    "DeviceType",
    "HeadsConfig",
    "LowRankConfig",
    "ModelConfig",
    "RopeScalingConfig",
    "Section",
    "SourceConfig",
    "build_config",
    "config_to_save",
    "load_config",
    "override_values",
    "read_values",
    "resolve",
    "saved_config",
    "with_device_memory",
]
