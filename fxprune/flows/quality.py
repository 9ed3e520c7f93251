"""Perplexity of a program before and after, as the report has it, on files and on prose that every Python ships."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxprune.core.registry import resolve
from fxprune.evaluation.perplexity import file_perplexity, perplexity, tokenise
from fxprune.runtimes.runners import GraphRunner, Runner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxprune.core.program import Program
    from fxprune.evaluation.perplexity import PerplexityResult

__all__ = ["perplexities", "quality_entry", "text_of_python"]


def text_of_python() -> str:
    """English prose that every Python ships: its language reference, as `pydoc` holds it."""
    from pydoc_data.topics import topics  # noqa: PLC0415 - 700 kB of text

    return "\n\n".join(topics[name] for name in sorted(topics))


def perplexities(
    program: Program,
    texts: Sequence[str],
    *,
    windows: int | None,
    window: int = 512,
    known: dict[str, PerplexityResult] | None = None,
) -> list[dict[str, Any]]:
    """Perplexity before and after on each text: a file, or `python` for Python's own language reference.

    Args:
        program: the slim program.
        texts: what to measure on.
        windows: how many windows of a text; all when None.
        window: tokens of each, fewer where the graph is for shorter sequences.
        known: results of the dense form by text, which are not measured again; new ones are put there.

    Returns:
        Entries of the report's `quality` section.
    """
    assert program.source is not None
    window = min(window, program.interface.fixed_length or window)
    lifted = program.references["lifted"]
    dense = GraphRunner(lifted.module, lifted.interface, "dense")
    slim = GraphRunner(program.graph_module, program.interface, "slim")
    known = {} if known is None else known
    entries = []
    for text in texts:
        if text not in known:
            known[text] = _perplexity(dense, text, program.source.tokenizer, windows, window)
        entries.append(quality_entry(known[text], _perplexity(slim, text, program.source.tokenizer, windows, window)))
    return entries


def _perplexity(runner: Runner, text: str, tokenizer: Any, windows: int | None, window: int) -> PerplexityResult:
    if text == "python":
        tokens = tokenise(text_of_python(), tokenizer)
        source = "Python's language reference (pydoc_data.topics, joined in the order of their names)"
        return perplexity(
            runner, tokens, text="python-reference", source=source, window=window, max_windows=windows, batch_size=1
        )
    return file_perplexity(runner, text, tokenizer, window=window, max_windows=windows, batch_size=1)


def quality_entry(dense: PerplexityResult | None, slim: PerplexityResult | None) -> dict[str, Any]:
    """An entry of the report's `quality` section."""
    entry: dict[str, Any] = resolve("fxprune.exporters.report:perplexity_entry")(dense, slim)
    return entry
