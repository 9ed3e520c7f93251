"""The Python blocks of each page in docs/ run in order, in one namespace and an empty directory, with tiny models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fxprune
from fxprune.channels.front_end import LOCATE
from fxprune.core.pipeline import Pipeline, build_pass
from fxprune.core.plan import Plan
from fxprune.tracing.trace import trace
from tests.conftest import TINY_LINES

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```python" in page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the line that it begins at."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"(?m)^```python\n(.*?)^```$", text, re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


@pytest.fixture(name="names", scope="session")
def _names(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tiny_llama_dir: Path,
    mixed_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What pages speak of in capitals: `DENSE`, `UNIFORM` and `MIXED` are directories, `TEXTS` are strings."""
    program = Pipeline([build_pass(name, {}) for name in LOCATE])(trace(tiny_llama, tokenizer=tiny_tokenizer)).program
    plan = Plan.of({f"model.layers.{layer}.mlp": range(64) for layer in range(2)})
    passes = [build_pass(name, {}) for name in ("insert_masks", "slim")]
    uniform = tmp_path_factory.mktemp("docs") / "uniform"
    fxprune.save(Pipeline(passes)(program.replace(plan=plan)).program, uniform)
    named = {"DENSE": tiny_llama_dir, "UNIFORM": uniform, "MIXED": mixed_dir}
    return {**{name: str(path) for name, path in named.items()}, "TEXTS": list(TINY_LINES)}


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_the_code_of_a_page_runs(
    page: Path, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__", **names}
    for line, code in blocks(page):
        # Empty lines before it, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)  # noqa: S102 - our own page


def test_there_are_pages() -> None:
    assert "fine-tune" in {page.stem for page in PAGES}
