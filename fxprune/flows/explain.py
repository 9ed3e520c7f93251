"""What a method is and what it takes, read from its docstrings: nothing is written down twice."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass

from fxprune.core.errors import UsageError
from fxprune.core.pass_base import constructor_options
from fxprune.core.registry import called, get_pass, pass_names
from fxprune.flows import verbs
from fxprune.flows.recipe import OF_DRIVER

__all__ = ["Explained", "MethodOption", "explain", "keywords", "methods"]

VERBS = ("prune", "sparsify", "learn")
_ARGUMENT = re.compile(r"^(\*{0,2}\w+): (.*)$")


@dataclass(frozen=True)
class MethodOption:
    """One option: its name, its type as it is written, its default (empty where it must be given), what it means."""

    name: str
    kind: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Explained:
    """A method.

    Attributes:
        name: how users choose it.
        verb: that runs it.
        summary: what it does, one sentence.
        text: what it does to a graph, where it comes from, what it costs and what it refuses.
        reads: what it reads: text, the loss of a language model, or weights alone.
        options: all that it takes, its own before those that it shares.
    """

    name: str
    verb: str
    summary: str
    text: str
    reads: str
    options: tuple[MethodOption, ...]


def methods() -> list[Explained]:
    """All pruning methods that there are, those of other packages included, by verb and name."""
    found = [explain(name) for name in pass_names() if get_pass(name).prunes]
    return sorted(found, key=lambda one: (VERBS.index(one.verb), one.name))


def explain(name: str) -> Explained:
    """Read what a method says about itself.

    Raises:
        RegistryError: there is none of this name.
        UsageError: it is a verb, or a step of every run.
    """
    if name in VERBS:
        listed = ", ".join(one.name for one in methods() if one.verb == name)
        raise UsageError(f"{name} is a verb: fxprune {name} --help; its methods are {listed}")
    if name in OF_DRIVER:
        raise UsageError(f"{name} is a step of every run, not a method: fxprune explain lists the methods")
    cls = get_pass(name)
    text = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or "")
    summary = " ".join(text.partition("\n\n")[0].split())
    meanings: dict[str, str] = {}
    for owner in cls.__mro__:
        for option, meaning in _arguments(owner.__dict__.get("__doc__") or "").items():
            meanings.setdefault(option, meaning)
    options = []
    for option, (parameter, _) in constructor_options(cls).items():
        must = parameter.default is inspect.Parameter.empty
        default = "" if must else repr(parameter.default)
        options.append(MethodOption(option, str(parameter.annotation), default, meanings.get(option, "")))
    reads = "weights alone"
    if cls.needs_data:
        reads = "calibration text, and the loss of a language model on it" if cls.reads_loss else "calibration text"
    return Explained(called(name), cls.verb, summary, text, reads, tuple(options))


def keywords(verb: str) -> list[str]:
    """What a verb takes beside the options of its methods."""
    function = getattr(verbs, verb)
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in {"method", "say", "tokenizer"}
    ]


def _arguments(doc: str) -> dict[str, str]:
    """The entries of the section `Args` of a docstring."""
    found: dict[str, str] = {}
    inside, current = False, ""
    for line in inspect.cleandoc(doc).splitlines():
        if not line.startswith(" ") and line.strip():
            inside = line.strip() == "Args:"
            continue
        if not inside:
            continue
        match = _ARGUMENT.match(line[4:])
        if match and line[4:5] != " ":
            current = match[1].lstrip("*")
            found[current] = match[2].strip()
        elif current and line.strip():
            found[current] += f" {line.strip()}"
    return found
