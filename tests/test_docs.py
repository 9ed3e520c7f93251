"""Every code block of README, CONTRIBUTING and docs/ runs, or is checked as far as the comment before it says.

`run`: the command runs, on a tiny model. `too long: REASON`: it only parses. `not ours: REASON`: nothing is checked.
Without a comment Python runs, and commands are parsed by the real command line. See docs/how-to-add.md.
"""

from __future__ import annotations

import ast
import copy
import importlib
import json
import pkgutil
import re
import shlex
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
import yaml

import fxprune
import fxprune.exporters
import fxprune.passes
from fxprune.channels.front_end import LOCATE
from fxprune.cli.main import app, main
from fxprune.core.pass_base import option_names
from fxprune.core.pipeline import Pipeline, build_pass, load_pipeline
from fxprune.core.plan import Plan
from fxprune.core.registry import get_pass
from fxprune.tracing.trace import trace
from tests.conftest import TINY_LINES

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS: Any = typer.main.get_command(app)
SMALL = ["--samples", "4", "--seq-len", "32"]
QUICK = {"prune": [*SMALL, "--guard", "none"], "sparsify": SMALL}
"""What is added to commands that run."""
DEFAULT_METHODS = {"prune": "channel", "sparsify": "sparsegpt", "learn": "l0"}
MARK = re.compile(r"(?:(?P<run>run)|too long: (?P<long>\S.+)|not ours: (?P<foreign>\S.+))?")


@dataclass(frozen=True)
class Block:
    """A code block: where it is, its language and code, and the comment before it."""

    page: Path
    line: int
    language: str
    code: str
    comment: str

    def mark(self, name: str) -> str | None:
        """A part of the comment."""
        found = MARK.fullmatch(self.comment)
        assert found is not None, f"{self}: <!-- {self.comment} --> is no mark"
        return found[name]

    def __str__(self) -> str:
        return f"{self.page.stem}-{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, m.start(3)) + 1, m[2], m[3], m[1] or "")
        for m in re.finditer(r"(?m)^(?:<!-- (.*?) -->\n)?```([^\n]*)\n(.*?)^```$", text, re.DOTALL)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page) if not block.language.startswith("{")]


def of(language: str) -> Any:
    """The blocks of a language, as parameters."""
    return [
        pytest.param(block, id=str(block))
        for block in BLOCKS
        if block.language == language and not block.mark("foreign")
    ]


# --- what the pages speak of ----------------------------------------------------------------------------------------


@pytest.fixture(name="names", scope="session")
def _names(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tiny_llama_dir: Path,
    mixed_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """What pages speak of in capitals: directories of tiny models."""
    program = Pipeline([build_pass(name, {}) for name in LOCATE])(trace(tiny_llama, tokenizer=tiny_tokenizer)).program
    plan = Plan.of({f"model.layers.{layer}.mlp": range(64) for layer in range(2)})
    passes = [build_pass(name, {}) for name in ("insert_masks", "slim")]
    uniform = tmp_path_factory.mktemp("docs") / "uniform"
    fxprune.save(Pipeline(passes)(program.replace(plan=plan)).program, uniform)
    model = shutil.copytree(tiny_llama_dir, uniform.with_name("model"))  # with room for the methods' own sequences
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 1024}
    (model / "config.json").write_text(json.dumps(config))
    named = {"MODEL": model, "DENSE": tiny_llama_dir, "UNIFORM": uniform, "MIXED": mixed_dir}
    return {name: str(path) for name, path in named.items()}


@dataclass(frozen=True)
class Place:
    """Where the blocks of a page run, one after the other, and what its Python has defined so far."""

    directory: Path
    namespace: dict[str, Any]


PLACES: dict[Path, Place] = {}


@pytest.fixture(name="place")
def _place(
    request: pytest.FixtureRequest,
    names: dict[str, str],
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    page = request.node.callspec.params["block"].page
    if page not in PLACES:
        directory = tmp_path_factory.mktemp(page.stem)
        text = "\n".join(TINY_LINES * 1000)
        for name in ("text.txt", "wiki.test.raw"):
            (directory / name).write_text(text)
        for name, field in (("text.jsonl", "text"), ("notes.jsonl", "body")):
            records = [{field: line, "title": line[:9]} if field != "text" else {field: line} for line in TINY_LINES]
            (directory / name).write_text("".join(json.dumps(record) + "\n" for record in records * 1000))
        model = copy.deepcopy(tiny_llama)
        inputs = {**tiny_tokenizer(TINY_LINES[0], return_tensors="pt"), "use_cache": True}
        known = {**names, "TEXTS": list(TINY_LINES), "model": model, "tokenizer": tiny_tokenizer, "inputs": inputs}
        PLACES[page] = Place(directory, {"__name__": "__main__", **known})
    monkeypatch.chdir(PLACES[page].directory)
    return PLACES[page]


# --- Python and YAML ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of("python"))
def test_python_runs(block: Block, place: Place) -> None:
    # Empty lines before it, so that a traceback names the line of the page.
    code = "\n" * (block.line - 1) + block.code
    if block.mark("long"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)
        return
    exec(compile(code, str(block.page), "exec"), place.namespace)  # noqa: S102 - our own page


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_is_valid(block: Block, place: Place, names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = yaml.safe_load(block.code)
    if block.mark("run"):
        text = re.sub("|".join(names), lambda match: names[match[0]], block.code)
        (place.directory / "recipe.yaml").write_text(text)
        run(["run", "recipe.yaml"], monkeypatch)
    elif "passes" in data:
        load_pipeline(data)
    else:  # a tasks.yaml: files of each split, by task
        assert all(isinstance(path, str) for files in data.values() for path in files.values())


# --- commands -------------------------------------------------------------------------------------------------------


def commands(code: str) -> list[list[str]]:
    """The words of each command of a bash block."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_fxprune(arguments: list[str]) -> None:
    """Every option exists and has the right form; those of `--option` are options of the method."""
    if arguments == ["--install-completion"]:
        assert any(arguments[0] in parameter.opts for parameter in COMMANDS.params)
        return
    verb, *rest = arguments
    context = COMMANDS.commands[verb].make_context(verb, rest)
    if verb in DEFAULT_METHODS:
        method = context.params.get("method") or DEFAULT_METHODS[verb]
        known = option_names(get_pass("magnitude-units" if (verb, method) == ("prune", "magnitude") else method))
        for given in context.params.get("option") or []:
            name, equals, value = given.partition("=")
            assert equals, given
            assert value, given
            assert name in known, f"{method} has no option {name}"


def check_python(arguments: list[str]) -> None:
    """`python -m benchmarks.NAME ...` or `python FILE ...`: it exists, and reads every option."""
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
        return
    source = ROOT / (arguments[1].replace(".", "/") + ".py")
    read = source.read_text() + (ROOT / "benchmarks" / "common.py").read_text()
    for word in arguments[2:]:
        assert not word.startswith("--") or f'"{word}"' in read, f"{arguments[1]} has no option {word}"


def check_pip(arguments: list[str]) -> None:
    """`pip install .[EXTRA]`: the extra exists."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[0] == "install"
    assert all(name in extras for name in re.findall(r"\[(.+?)\]", arguments[1]))


def check_make(arguments: list[str]) -> None:
    """The target exists."""
    assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()


CHECKS = {"fxprune": check_fxprune, "python": check_python, "pip": check_pip, "make": check_make}


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `fxprune ARGUMENTS`; it must end with 0."""
    monkeypatch.setattr(sys, "argv", ["fxprune", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, arguments


@pytest.mark.parametrize("block", of("bash"))
def test_commands_parse_and_cheap_ones_run(
    block: Block, place: Place, names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in commands(block.code):
        CHECKS[words[0]](words[1:])
        if block.mark("run"):
            assert words[0] == "fxprune"
            given = [names.get(word, word) for word in words[1:]]
            run([*given, *QUICK.get(words[1], ())], monkeypatch)
    assert place.directory.is_dir()


def test_commands_in_sentences_have_these_options() -> None:
    """Inline code such as `fxprune eval --tasks lambada_openai`."""
    for page in PAGES:
        prose = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
        for text in re.findall(r"`fxprune ([^`]*)`", prose):
            words = shlex.split(" ".join(text.replace("\\|", "|").split()))
            if not words or not words[0].islower() or words[0].startswith("-"):
                continue
            options = {name for parameter in COMMANDS.commands[words[0]].params for name in parameter.opts}
            options |= {name for parameter in COMMANDS.commands[words[0]].params for name in parameter.secondary_opts}
            for word in words[1:]:
                assert not word.startswith("--") or word in options, f"{page.name}: fxprune {text}"


# --- the pages as a whole -------------------------------------------------------------------------------------------


def test_every_block_has_a_check() -> None:
    assert {block.language for block in BLOCKS} <= {"python", "bash", "yaml", "toml"}
    assert sum(block.language == "python" for block in BLOCKS) > 20
    assert any(block.mark("run") for block in BLOCKS)


def test_a_wrong_option_is_found() -> None:
    with pytest.raises(Exception, match="--ration"):
        check_fxprune(["prune", "MODEL", "--ration", "0.2", "--out", "slim"])
    with pytest.raises(AssertionError, match="channel has no option evennes"):
        check_fxprune(["prune", "MODEL", "--ratio", "0.2", "--out", "slim", "--option", "evennes=0.5"])
    with pytest.raises(AssertionError, match="benchmarks.sweep has no option --pages"):
        check_python(["-m", "benchmarks.sweep", "--pages", "docs/sweep.md"])


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """Of the pages that Sphinx does not read; it checks those in docs/."""
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(("page", "package"), [("passes", fxprune.passes), ("exporters", fxprune.exporters)])
def test_the_reference_has_every_module(page: str, package: Any) -> None:
    listed = set(re.findall(rf"automodule:: {package.__name__}\.(\w+)", (ROOT / "docs" / f"{page}.md").read_text()))
    assert listed == {module.name for module in pkgutil.iter_modules(package.__path__)}
