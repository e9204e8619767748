"""Turn pydantic's errors into one line per mistake in a job: table, key, value, and what it must be.

Also describes a key's type in words, which the docs use too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from rustsim_hpc.errors import nearest

_ARTICLES = {"integer": "an ", "number": "a ", "list": "a "}

Origin = dict[tuple[str, str], str]
"""(table, key) → the option or variable that set it; a key of the file has no entry."""


def fields_of(table: Any) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each key of a table by the key's name in the file; {} where keys are free."""
    if not (isinstance(table, type) and issubclass(table, BaseModel)):
        return {}
    properties: dict[str, dict[str, Any]] = TypeAdapter(table).json_schema(by_alias=True)["properties"]
    return properties


def kind_of(schema: Mapping[str, Any]) -> str:
    """Return a key's type in words: "integer ≥ 0", `"inline" | "threads"`."""
    if "kind" in schema:
        return str(schema["kind"])
    if "anyOf" in schema:
        return " or ".join(kind_of(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return " | ".join(f'"{value}"' for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {kind_of(schema['items'])}s"
    words = {"boolean": "true or false", "string": "text"}.get(schema["type"], str(schema["type"]))
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None:
        words += f" ≥ {low:g}" if abs(low) < 10**6 else " of 64 bits"
    elif "exclusiveMinimum" in schema:
        words += f" > {schema['exclusiveMinimum']:g}"
    elif high is not None:
        words += f" ≤ {high:g}"
    return words


def describe(error: ValidationError, path: Path, sources: Origin, tables: Mapping[str, Any]) -> list[str]:
    """Return one line for each mistake, without repetition, in the order in which pydantic found them."""
    mistakes = error.errors()
    if any(mistake["type"] == "extra_forbidden" for mistake in mistakes):
        # A misspelt key may also be reported as missing: only the first line helps.
        mistakes = [mistake for mistake in mistakes if mistake["type"] != "missing"]
    lines = [_line(mistake, path, sources, tables, error.title) for mistake in mistakes]
    return list(dict.fromkeys(lines))


def _line(mistake: Any, path: Path, sources: Origin, tables: Mapping[str, Any], title: str) -> str:
    # [command] is validated separately, so its errors lack the table's name.
    location = tuple(str(part) for part in mistake["loc"])
    if title == "CommandTable":
        location = ("command", *location)
    table, key = location[0], location[1] if len(location) > 1 else ""
    where = sources.get((table, key)) or f"{path}: [{table}]{f' {key}' if key else ''}"
    if mistake["type"] == "extra_forbidden":
        return _unknown(where, table, key, tables)
    if mistake["type"] == "missing":
        return f"{where}: is missing"
    if mistake["type"] == "value_error":
        return f"{where}{' ' if table == 'params' else ': '}{mistake['ctx']['error']}"
    given = mistake["input"]
    if not key:
        return f"{path}: {table} must be a table ([{table}]), not {given!r}"
    schema = fields_of(tables[table]).get(key, {})
    kind = kind_of(schema)
    article = _ARTICLES.get(kind.split()[0], "")
    return f"{where}: must be {article}{kind}, not {toml_value(given)}{_near(given, schema)}"


def toml_value(value: Any) -> str:
    """Return a value as TOML would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _near(given: Any, schema: Mapping[str, Any]) -> str:
    return nearest(given, schema.get("enum", ())) if isinstance(given, str) else ""


def _unknown(where: str, table: str, key: str, tables: Mapping[str, Any]) -> str:
    if not key:
        return f"{where.removesuffix(f'[{table}]')}there is no table [{table}]{nearest(table, tables)}"
    elsewhere = [name for name, other in tables.items() if key in fields_of(other)]
    advice = f" (it belongs to [{elsewhere[0]}])" if elsewhere else nearest(key, fields_of(tables[table]))
    return f"{where}: there is no such key{advice}"
