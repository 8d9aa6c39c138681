"""Stand-in."""

from lightopd.errors import ConfigError


def run_shell(opened: object) -> None:
    raise ConfigError("give one query")
