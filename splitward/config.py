"""TOML configuration into frozen, typed structs. An unknown key is an error with a suggestion."""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec

from splitward.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack 6 has Python 3.10
    import tomli as tomllib

T = TypeVar("T", bound=msgspec.Struct)


def read_config(path: Path, kind: type[T]) -> T:
    """Read the TOML file `path` into the struct type `kind`.

    Raises
    ------
    ConfigError
        The file is missing, is not TOML, has an unknown key, or a value of the wrong type; the message
        names the file, the key, and what to do.
    """
    return build_config(read_toml(path), kind, where=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Plain values of the TOML file `path`; `ConfigError` when it is missing, unreadable, or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Give the path of a TOML file with --config.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}.") from error


def parse_toml(text: str) -> dict[str, Any]:
    """Plain values of TOML `text`; `ValueError` when it is none."""
    return tomllib.loads(text)


def format_toml(tables: dict[str, Any]) -> str:
    """Plain `tables` as TOML; a value of None is left out."""
    lines: list[str] = []

    def write(header: str, table: str, values: dict[str, Any]) -> None:
        nested = {key: value for key, value in values.items() if _is_table(value)}
        if header:
            lines.append(header)
        lines.extend(
            f"{key} = {_format_value(value)}"
            for key, value in values.items()
            if key not in nested and value is not None
        )
        for key, value in nested.items():
            name = f"{table}.{key}" if table else key
            many = not isinstance(value, dict)
            for one in value if many else [value]:
                write(f"[[{name}]]" if many else f"[{name}]", name, one)

    write("", "", tables)
    return "\n".join(lines) + "\n"


def _format_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_format_value(one) for one in value)}]"
    if isinstance(value, float):
        return float.__repr__(value)  # JSON has no word for what TOML calls inf and nan
    # JSON's strings are TOML's, where they escape no pair of surrogates, and do escape the last control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _is_table(value: Any) -> bool:
    """Whether it is a table, or a list of some."""
    return isinstance(value, dict) or (
        isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], dict)
    )


def build_config(values: dict[str, Any], kind: type[T], where: str) -> T:
    """Convert plain `values` into the struct type `kind`; `where` names their origin in errors."""
    _refuse_unknown_keys(values, kind, where, prefix="")
    try:
        return msgspec.convert(values, kind, strict=True)
    except msgspec.ValidationError as error:
        described = f"{kind.__module__.replace('.', '/')}.py"
        raise ConfigError(f"{where}: {error}. Correct the value; {described} describes every key.") from error


def _refuse_unknown_keys(values: dict[str, Any], kind: type[msgspec.Struct], where: str, prefix: str) -> None:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key, value in values.items():
        name = prefix + key
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"Did you mean '{prefix}{near[0]}'?" if near else f"Known keys: {', '.join(sorted(fields))}."
            raise ConfigError(f"{where}: unknown key '{name}'. {hint}")
        for nested in _struct_types(fields[key].type):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict):
                    _refuse_unknown_keys(item, nested, where, prefix=name + ".")


def _struct_types(kind: Any) -> list[type[msgspec.Struct]]:
    """Struct types inside an annotation such as `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [found for part in get_args(kind) for found in _struct_types(part)]
