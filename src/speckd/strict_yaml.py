"""A user's YAML file: one mapping, no key twice, and a mistake named by its line."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from speckd.errors import ConfigError


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, which YAML itself would settle silently."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a file.

    Raises:
        ConfigError: there is none, or it is no mapping, naming the line.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file", "Check --config")
    return yaml_of(path.read_bytes(), str(path))


def yaml_of(text: str | bytes, name: str) -> dict[str, Any]:
    """The keys and values of what stands in a file of that name.

    Raises:
        ConfigError: it is no mapping, naming the line.
    """
    try:
        values = _UniqueKeys(text).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f"{name}:{line + 1}" if line is not None else name
        raise ConfigError(f"{where}: {getattr(error, 'problem', None) or 'not readable as YAML'}", "Correct the YAML") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deep", "Write one setting a line") from None
    if values is None:
        raise ConfigError(f"{name}: the file is empty", "Write one setting a line, such as 'learning_rate: 1e-4'")
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: not a list of 'key: value' lines", "Write one setting a line")
    return {str(key): value for key, value in values.items()}
