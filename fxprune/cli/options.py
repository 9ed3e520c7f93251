"""What the texts of options mean: numbers with suffixes, and any option of a method as NAME=VALUE.

Texts become values here, with messages that name the option; whether a value is in range is told by the pass.
"""

from __future__ import annotations

import inspect
import json
import re
from typing import TYPE_CHECKING, Any

from fxprune.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["parse_amounts", "parse_options", "targets_of"]

_SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?(?:nan|inf))([kmg]?)", re.ASCII | re.IGNORECASE)


def parse_amounts(option: str, text: str) -> float | list[float]:
    """Read one number, or several with commas between; `k`, `M` and `G` are thousands, millions, thousand millions.

    Args:
        option: as the user typed it, for messages.
        text: such as `100M` or `0.1,0.2`.

    Raises:
        UsageError: it is no number.
    """
    found = []
    for part in text.split(","):
        match = _NUMBER.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"{option} {text}: {part.strip()!r} is no number; write such as 0.2, 1.3e8 or 130M")
        found.append(float(match[1]) * _SUFFIXES[match[2].lower()])
    return found if len(found) > 1 else found[0]


def targets_of(texts: Mapping[str, str | None], *, table: object, mix: Mapping[str, Any] | None) -> dict[str, Any]:
    """The target that was given, and what belongs to a speed-up.

    Args:
        texts: of `ratio`, `target_params`, ..., by name.
        table: of latencies.
        mix: of its cases.

    Raises:
        UsageError: a text cannot be read, or two targets were given, or a mix or a table without a target speed-up.
    """
    named = {name: f"--{name.replace('_', '-')}" for name in texts}
    found: dict[str, Any] = {name: parse_amounts(named[name], text) for name, text in texts.items() if text is not None}
    if not found:
        raise UsageError(f"say how much goes: {' or '.join(named.values())}, such as --ratio 0.2")
    if len(found) > 1:
        raise UsageError(f"give one target, not {' and '.join(named[name] for name in found)}")
    timed = "target_speedup" in found
    if mix is not None and not timed:
        raise UsageError("mix weighs the cases of --target-speedup; leave it out")
    if timed != (table is not None):
        raise UsageError("--target-speedup and --table go together; fxprune bench MODEL --table FILE makes a table")
    if table is not None:
        found["table"] = str(table)
    if mix is not None:
        found["mix"] = mix
    return found


def parse_options(method: str, texts: Sequence[str], verb: Callable[..., Any]) -> dict[str, Any]:
    """Read `--option NAME=VALUE`: a value is JSON, or else text.

    For an option that is a list, text with commas between is one, and repeating it adds to it (`include=*.q_proj`); for
    one that maps names to values, the text is `NAME=VALUE` (`keep=*.mlp=0.5`, `mix=prefill-512=1,decode=2`).

    Args:
        method: whose options they are.
        texts: one each.
        verb: the command; what it has a flag for is given by that.

    Raises:
        UsageError: one has no `=`, a name comes twice, or it is that of a flag.
        RegistryError: there is no such method.
    """
    from fxprune.core.pass_base import constructor_options
    from fxprune.core.registry import get_pass

    declared = {
        name: str(parameter.annotation) for name, (parameter, _) in constructor_options(get_pass(method)).items()
    }
    flags = set(inspect.signature(verb).parameters)
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not name:
            raise UsageError(f"--option {text!r}: give NAME=VALUE, such as round_to=32")
        if name in flags:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"--option {text}: write {flag if value == 'true' else f'{flag} {value}'}, which is a flag"
            )
        kind = declared.get(name, "")
        if "Mapping[" in kind and not value.lstrip().startswith("{"):
            for part in value.split(","):
                pattern, sign, amount = part.strip().rpartition("=")
                if not sign or not pattern:
                    raise UsageError(f"--option {text!r}: give {name}=PATTERN=VALUE, such as {name}=*.mlp=0.5")
                if pattern in found.get(name, {}):
                    raise UsageError(f"--option {name}: {pattern} is given twice")
                found[name] = {**found.get(name, {}), pattern: _value(amount)}
        elif "Sequence[str]" in kind and not value.lstrip().startswith("["):
            parts = [part.strip() for part in value.split(",")]
            if not all(parts):
                raise UsageError(f"--option {text!r}: there is an empty name between the commas")
            found[name] = [*found.get(name, []), *parts]
        elif name in found:
            raise UsageError(f"--option {name}: it is given twice")
        else:
            found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
