"""Binding of mappings to dataclasses: every key known, present, of the right type and in range.

The sections of a config are exactly what the code reads, so a key that nothing reads cannot exist.
"""

import ast
import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable
from typing import Any

from ig_jax.base.errors import UserError, check

LARGEST = {int: (2**31 - 1, "a whole number below 2^31"), float: (3.4e38, "a number that float32 holds")}
SWITCHES = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


class Text(str):
    """A value as written on the command line, still to be read by the type of its setting."""


def bind(cls: type, values: Any, prefix: str = "config") -> Any:
    """An instance of the dataclass `cls` filled from a mapping.

    A field with a default may be left out. A class with a classmethod `of(mapping)` is made by that.
    Raises: UserError that names the key by its full path, for one that is unknown, missing, mistyped, not finite or out
    of range.
    """
    hints = typing.get_type_hints(cls)
    check(hasattr(values, "keys"), prefix, values, f"a section with the keys {', '.join(hints)}")
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [field.name for field in dataclasses.fields(cls) if (field.default, field.default_factory) == missing]
    return _made(cls, typed(hints, dict(values.items()), needed, f"{prefix}."), prefix)


def typed(hints: dict[str, Any], given: dict[str, Any], needed: list[str], prefix: str = "") -> dict[str, Any]:
    """The given values by name, each as its type in `hints`.

    Raises: UserError that names the key, for one that is unknown or mistyped, or `needed` and missing.
    """
    for key, value in given.items():
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            fix = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(hints)}"
            problem = f"{prefix}{key} is not a setting that anything reads"
            raise UserError(problem, name=f"{prefix}{key}", value=value, fix=fix)
    for name in (f"{prefix}{key}" for key in needed if key not in given):
        raise UserError(f"{name} is missing", name=name, expected="given", fix="set it in the config file")
    return {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in given.items()}


def unread(cls: type, values: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of what no field of the dataclass `cls` takes; classes with `of` say so themselves."""
    hints, found = typing.get_type_hints(cls), []
    for key, value in values.items():
        hint, name = hints.get(key), f"{prefix}{key}"
        if hint is None:
            found.append(name)
        choices = typing.get_args(hint) or (hint,)
        if isinstance(value, dict) and all(map(dataclasses.is_dataclass, choices)) and not hasattr(hint, "of"):
            with contextlib.suppress(UserError):  # of a section without the name of one, which `bind` reports
                chosen: Any = _named(choices, value, name) if len(choices) > 1 else hint
                found += unread(chosen, value, f"{name}.")
    return found


def _made(make: Callable[..., Any], fields: dict[str, Any], section: str) -> Any:
    """make(**fields), whose errors name their keys within `section`."""
    try:
        return make(**fields)
    except UserError as error:
        raise error.within(section) from error


def _convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type `hint`."""
    if typing.get_origin(hint) is types.UnionType:
        choices = typing.get_args(hint)
        if not all(map(dataclasses.is_dataclass, choices)):
            return _one_of(choices, value, name)
        value = _read(dict, value, name) if isinstance(value, Text) else value
        hint = _named(choices, value, name)
    if isinstance(value, Text):
        value = _read(hint, value, name)
    if hasattr(hint, "of"):
        check(hasattr(value, "keys"), name, value, "a section with keys")
        return _made(lambda: hint.of(dict(value.items())), {}, name)
    if dataclasses.is_dataclass(hint):
        return bind(typing.cast(type, hint), value, name)
    if typing.get_origin(hint) is typing.Literal:
        return value  # _named has chosen by it
    if typing.get_origin(hint) is tuple:
        return _tuple(typing.get_args(hint), value, name)
    wanted = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}[hint]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and number,
        float: number and math.isfinite(value),
        str: isinstance(value, str),
    }[hint]
    check(fits, name, value, wanted)
    if hint in LARGEST:
        largest, expected = LARGEST[hint]
        check(abs(value) <= largest, name, value, expected)
    return hint(value)


def _read(hint: Any, text: Text, name: str) -> Any:
    """`text` as a value of the type `hint`; where it is none, as it is, for `_convert` to refuse."""
    text, sequence = Text(text.strip()), typing.get_origin(hint) is tuple
    if hint is bool:
        return SWITCHES.get(text.lower(), str(text))
    if hint is str:
        check(text != "None", name, None, "text")
        return str(text)
    try:
        if hint in (int, float):
            return int(text, 0 if "x" in text else 10) if hint is int else float(text)
        if not sequence or text[:1] in ("(", "["):
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if not sequence:
            return str(text)
    return tuple(Text(part) for part in text.strip("()[]").split(",") if part.strip())


def _one_of(hints: tuple, value: Any, name: str) -> Any:
    """`value` as the first of the types that takes it; None only where it is one of them."""
    if value is None and types.NoneType in hints:
        return None
    expected = []
    for hint in hints:
        try:
            return _convert(hint, value, name)
        except UserError as error:
            expected.append(error.expected)
    raise UserError(name=name, value=value, expected=" or ".join(dict.fromkeys(expected)))


def _named(choices: tuple, value: Any, name: str) -> Any:
    """The one of several dataclasses whose `name` is the section's; each has fields of its own."""
    check(hasattr(value, "keys") and "name" in value, name, value, "a section with a name")
    known = {typing.get_args(typing.get_type_hints(cls)["name"])[0]: cls for cls in choices}
    chosen = str(value["name"])
    check(chosen in known, f"{name}.name", value["name"], f"one of {', '.join(known)}")
    return known[chosen]


def _tuple(args: tuple, value: Any, name: str) -> tuple:
    """`value`, or a single number, as a tuple of the types `args`."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    if args[-1] is Ellipsis:
        args = (args[0],) * len(values)
    check(len(values) == len(args), name, value, f"{len(args)} numbers")
    return tuple(_convert(arg, item, name) for arg, item in zip(args, values, strict=True))
