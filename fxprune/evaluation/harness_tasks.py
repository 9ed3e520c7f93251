"""The tasks of lm-eval's harness with their data, from the hub or from local files.

Prompts, metrics and versions are lm-eval's own: a local task is the stock one with nothing but its data replaced. Which
files a task reads is data, see `TASK_FILES`; a `tasks.yaml` beside the files adds to it or overrides it.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fxprune.core.errors import CalibrationError, UsageError
from fxprune.models.loading import expand_user

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = ["TASK_FILES", "DataFile", "HarnessTask", "load_tasks", "quiet", "task_key"]

TASK_FILES: Mapping[str, Mapping[str, str]] = {
    "lambada_openai": {"test": "lambada/lambada_test.jsonl"},
    "wikitext": {"test": "wikitext-2-raw/pages_test.jsonl"},
    "arc_easy": {"test": "zero_shot/arc/ARC-Easy/test.jsonl"},
    "arc_challenge": {"test": "zero_shot/arc/ARC-Challenge/test.jsonl"},
    "openbookqa": {"test": "zero_shot/openbookqa/test.jsonl"},
    "winogrande": {"validation": "zero_shot/winogrande/validation.jsonl"},
}
"""Task, split, and the JSON-lines file with that split, relative to the data directory.

A file has the fields of the data set that the stock task names. The split that the task is evaluated on (`test`, or
`validation` where the task has no other) must be there. `tasks.yaml` in the data directory has the same form:

    hellaswag:
      validation: hellaswag/val.jsonl
"""

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class DataFile:
    """A local file that a task reads.

    Attributes:
        split: such as `test`.
        path: as found.
        sha256: of the file, 64 hexadecimal digits.
    """

    split: str
    path: str
    sha256: str


@dataclass(frozen=True)
class HarnessTask:
    """A task with its data, ready to run on any number of models.

    Attributes:
        name: lm-eval's.
        task: lm-eval's task object.
        dataset: hub id and configuration of the data set; `json` for local files.
        files: the local files; empty when the data came from the hub.
    """

    name: str
    task: Any
    dataset: str
    files: tuple[DataFile, ...]


def load_tasks(names: Sequence[str], data: str | Path | None = None) -> list[HarnessTask]:
    """Find tasks and load their data.

    Args:
        names: tasks, groups or tags that lm-eval knows; local files serve tasks only.
        data: directory with local files, see `TASK_FILES`; the hub when None.

    Raises:
        UsageError: a name is unknown or comes twice.
        CalibrationError: `lm-eval` is not installed, or data is missing or not what the task needs.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise CalibrationError('tasks need the package lm-eval: pip install "fxprune[eval]"')
    if len(set(names)) < len(names):
        raise UsageError(f"a task is named twice: {', '.join(names)}")
    if data is None:
        return [task for name in names for task in _from_hub(name)]
    folder = expand_user(data)
    if not folder.is_dir():
        raise CalibrationError(f"{folder} is not a directory; name the one that holds the tasks' files")
    table = {**TASK_FILES, **_read_table(folder / "tasks.yaml")}
    return [_from_files(name, folder, table) for name in names]


def task_key(ready: HarnessTask, limit: int | None) -> dict[str, Any]:
    """Everything of a task that its figures depend on, as JSON data: what tells cached results apart.

    Args:
        ready: a task that has not run yet: running it fills in defaults.
        limit: the first so many documents are used; all when None.

    Returns:
        Versions of task and package, and hashes of its configuration (prompts, metrics, and the source of its
        functions), of the documents as they were loaded, and of the examples in its prompts.
    """
    config = ready.task.dump_config()
    # Where files lie says nothing: the documents themselves are hashed.
    shots = config.pop("num_fewshot", None) or 0
    config.pop("dataset_kwargs", None)
    config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
    return {
        "task": ready.name,
        "version": str(ready.task.VERSION),
        "lm_eval": version("lm_eval"),
        "num_fewshot": shots,
        "config": _documents_hash([config]),
        "documents": _documents_hash(itertools.islice(ready.task.eval_docs, limit)),
        "examples": _documents_hash(ready.task.fewshot_docs() if shots else ()),
        "dataset": ready.dataset,
        "limit": limit,
    }


def _documents_hash(documents: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for document in documents:
        found.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


def _find(name: str) -> Any:
    """lm-eval's `TaskManager` that knows a name."""
    import lm_eval.tasks  # noqa: PLC0415 - optional and slow to import

    root = Path(lm_eval.tasks.__file__).parent
    # Reading all of its 14,000 tasks takes 10 s; most stand in a folder of their own name, or of its first words.
    words = name.split("_")
    likely = [root / "_".join(words[:end]) for end in range(len(words), 0, -1)]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[path for path in likely if path.is_dir()])
    if name in manager.all_subtasks:
        return manager
    manager = _manager_of_all()
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, [*TASK_FILES, *manager.all_tasks], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; `lm-eval ls tasks` lists what it knows"
        raise UsageError(f"lm-eval has no task {name!r}{hint}")
    return manager


@functools.cache
def _manager_of_all() -> Any:
    import lm_eval.tasks  # noqa: PLC0415 - optional and slow to import

    return lm_eval.tasks.TaskManager()


def _from_hub(name: str) -> list[HarnessTask]:
    manager = _find(name)
    with _data_errors(
        f"the data of task {name!r} cannot be read from the hub",
        "to read local files, name their directory with --data",
    ):
        built = manager.load([name])["tasks"]
    return [_ready(key, task, ()) for key, task in built.items()]


def _ready(name: str, task: Any, files: tuple[DataFile, ...]) -> HarnessTask:
    """A task that lm-eval has built, unless it needs what a language model on this machine must not or cannot do."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"task {name!r} runs code that the model writes; that is not done here")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"task {name!r} has images or sound; choose a task of text")
    return HarnessTask(name, task, _dataset(task), files)


def _dataset(task: Any) -> str:
    parts = (task.config.dataset_path, task.config.dataset_name)
    return ", ".join(str(part) for part in parts if part)


def _from_files(name: str, folder: Path, table: Mapping[str, Mapping[str, str]]) -> HarnessTask:
    """The stock task with nothing but its data replaced."""
    manager = _find(name)
    if name not in manager.all_subtasks:
        raise UsageError(f"{name!r} is a group or a tag; with local files, name its tasks one by one")
    if name not in table:
        raise CalibrationError(
            f"there are no files for task {name!r}; {folder / 'tasks.yaml'} can name them (known: {', '.join(table)})"
        )
    paths = {split: folder / file for split, file in table[name].items()}
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        raise CalibrationError(f"the data of task {name!r} is missing: {', '.join(missing)}")
    entry = manager.task_index[name]
    stock = {split: entry.cfg.get(split) for split in _SPLITS}
    evaluated = stock["test_split"] or stock["validation_split"]
    examples = stock["fewshot_split"] or stock["training_split"] or stock["validation_split"] or evaluated
    for split in [evaluated, *([examples] if entry.cfg.get("num_fewshot") else [])]:
        if split not in paths:
            raise CalibrationError(
                f"task {name!r} needs its split {split!r}, but its files are for {', '.join(paths)}; name one for it "
                f"in {folder / 'tasks.yaml'}"
            )
    config = {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in paths.items()}},
        "custom_dataset": None,
        **{key: split if split in paths else None for key, split in stock.items()},
    }
    with tempfile.TemporaryDirectory(prefix="fxprune-") as scratch:
        file = Path(scratch) / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        with _data_errors(f"task {name!r} cannot use {', '.join(map(str, paths.values()))}", "compare its fields"):
            task = manager.load([str(file)])["tasks"][name]
    files = (DataFile(split, str(path), hashlib.sha256(path.read_bytes()).hexdigest()) for split, path in paths.items())
    return _ready(name, task, tuple(files))


def _read_table(file: Path) -> dict[str, dict[str, str]]:
    """A user's own table of files."""
    if not file.is_file():
        return {}
    try:
        table = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CalibrationError(f"{file} cannot be read as YAML: {error}") from error
    rows = table.items() if isinstance(table, dict) else [("", None)]
    for name, row in rows:
        if not isinstance(row, dict) or not all(isinstance(text, str) for pair in row.items() for text in pair):
            raise CalibrationError(f"{file}: {name or 'the whole'} is not of the form `task: {{split: file}}`")
    return dict(table)


@contextmanager
def _data_errors(what: str, advice: str) -> Iterator[None]:
    """Turn what lm-eval and datasets raise for data into our own error."""
    logger = logging.getLogger("lm_eval")  # it warns of each default that a task of its own relies on
    level = logger.level
    with quiet():
        try:
            logger.setLevel(logging.ERROR)
            yield
        except Exception as error:  # theirs share no base: hub, parser, template and task errors
            reason = str(error).strip().partition("\n")[0]
            raise CalibrationError(f"{what}: {type(error).__name__}: {reason}; {advice}") from error
        finally:
            logger.setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the bars that lm-eval and datasets draw wherever they run; ours show on terminals only."""
    import datasets  # noqa: PLC0415 - comes with the optional lm-eval
    import lm_eval.api.task as module  # noqa: PLC0415 - optional

    bars, shown = module.tqdm, datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    module.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        module.tqdm = bars
        if shown:
            datasets.enable_progress_bars()
