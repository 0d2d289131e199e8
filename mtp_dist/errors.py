"""Errors that a user can fix. Every command prints their message without a traceback and exits with status 2."""


class UserError(ValueError):
    """An error whose message names the key, file or rank at fault and the remedy."""


class ConfigError(UserError):
    """An invalid configuration, or settings that exclude each other."""


class DataError(UserError):
    """A source, corpus or tokenizer that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint, or a folder of a foreign model, that cannot be used."""


class LaunchError(UserError):
    """A job that cannot start as it was launched: its ranks, devices, folders or environment."""


class TrainingDivergedError(UserError):
    """A training whose loss or gradients do not recover."""
