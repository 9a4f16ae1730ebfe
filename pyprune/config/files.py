"""A run's configuration as a YAML file, and with some of its fields changed."""

from __future__ import annotations

from pathlib import Path

from pyprune import effects
from pyprune.config.checks import ConfigError, Unused, check_effects
from pyprune.config.mappings import from_dict, to_dict
from pyprune.config.run import SECTIONS, PruneConfig


def to_yaml(config: PruneConfig) -> str:
    """YAML text that :func:`from_yaml` turns back into an equal configuration."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def override(base: PruneConfig | str | Path | None, values: dict) -> PruneConfig:
    """A configuration, or the YAML file of one, with the fields of a nested mapping put in their places.

    What the base set and the new fields leave without effect returns to its default; a field of ``values`` that would
    do nothing is a :class:`ConfigError`.
    """
    if base is None:
        return from_dict(PruneConfig, values)
    base = base if isinstance(base, PruneConfig) else from_yaml(base)
    merged = {key: dict(vars(value)) if key in SECTIONS else value for key, value in vars(base).items()}
    if base.inputs == base.usual_inputs:
        merged["inputs"] = None  # the new fields may have other usual ones
    for key, value in values.items():
        merged[key] = {**merged[key], **value} if key in SECTIONS and isinstance(value, dict) else value
    while True:
        try:
            return from_dict(PruneConfig, merged)
        except Unused as error:
            section, _, name = error.field.rpartition(".")
            given = values.get(section, {}) if section else values
            if not isinstance(given, dict) or name in given:
                raise
            del (merged[section] if section else merged)[name]


def from_yaml(text_or_path: str | Path) -> PruneConfig:
    """Configuration from YAML text or the path of a YAML file."""
    return from_dict(PruneConfig, read_yaml(text_or_path), place_of(text_or_path))


def place_of(text_or_path: str | Path) -> str:
    """What a sentence calls the configuration: the file's path, or ``config``."""
    return "config" if "\n" in str(text_or_path) else str(text_or_path)


def read_yaml(text_or_path: str | Path) -> dict:
    """The mapping in YAML text or in a YAML file. Raises ConfigError if there is no such file or no mapping in it."""
    import yaml

    text = str(text_or_path)
    if "\n" not in text:
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"no such configuration file: {text}")
        text = path.read_text()
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{place_of(text_or_path)} must hold settings as lines of 'name: value', got {type(values).__name__}"
        )
    return values


def check_named(config: PruneConfig, values: dict) -> None:
    """Raise :class:`Unused` for a field of a nested mapping that would do nothing, be its value the default or not: on
    a command line whoever writes an option expects something of it."""
    paths = {f"{key}.{name}" for key, value in values.items() if key in SECTIONS for name in value}
    check_effects(config, effects.RUN, "", {*values, *paths})
    for section, rules in (("calibration", effects.CALIBRATION), ("evaluation", effects.EVALUATION)):
        check_effects(getattr(config, section), rules, section, values.get(section, {}))
