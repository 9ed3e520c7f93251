"""Calibration samples: text from the model itself, a local file or a data set, cut into windows of tokens.

Calibration text shapes what pruning keeps, so what was used is described down to the hash of the tokens, and the same
options give the same samples. Text that a model samples from itself needs nothing at hand (Williams et al. 2024,
"Self-calibration for Language Model Quantization and Pruning").
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fxprune.calibration.records import documents_of, record_form, require_template
from fxprune.core.errors import CalibrationError, NotFiniteError, UsageError
from fxprune.evaluation.perplexity import hash_tokens, read_text
from fxprune.models.loading import expand_user, max_positions
from fxprune.runtimes.runners import position_ids_from_mask, text_maker

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from fxprune.calibration.records import Chat, RecordForm
    from fxprune.core.program import Program
    from fxprune.runtimes.runners import Runner

__all__ = [
    "CalibrationSet",
    "CalibrationSpec",
    "calibration_set",
    "check_records",
    "held_out_windows",
    "sample_from_model",
    "texts_of",
]

_FILE_SUFFIXES = {".txt", ".jsonl", ".json", ".raw", ".text", ".md", ".csv", ".parquet"}
_RECORDS = (".jsonl", ".json")
_CHATS = "chats, written by the tokenizer's chat template"
_POOL = 4
"""Documents are read, in random order, until there are this many times the tokens asked for to choose windows from."""
_SHUFFLE_BUFFER = 1000
_DOCUMENTS_AT_ONCE = 64
_SHOWN = 200
"""Characters of the first sample that a description holds."""


@dataclass(frozen=True)
class CalibrationSpec:
    """Which calibration samples are wanted.

    Attributes:
        source: `"self"` for text sampled from the model; records in a `.jsonl` file (one JSON object a line), a `.json`
            file (a list of objects) or a `.parquet` file; any other file as plain UTF-8 text; or a data set on the hub
            or in a directory, `NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT` (split `train` unless named).
        samples: how many sequences.
        seq_len: tokens of each.
        seed: of every random choice.
        batch_size: sequences sampled at once with `"self"`; it does not change which tokens are asked for.
        text_field: field of the records with a text or a list of messages. None reads `text`, or else chats (see
            `fxprune.calibration.records`), and refuses records where it is not clear which field is meant.

    Raises:
        UsageError: a value is out of range, or there are no records to have a field.
    """

    source: str = "self"
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    batch_size: int = 32
    text_field: str | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise UsageError("the calibration source is empty; use self, a file or a data set")
        if self.text_field is not None and (not self.text_field or self.source == "self"):
            raise UsageError(
                f"text_field {self.text_field!r} names a field of calibration records: give it with a .jsonl file or a "
                "data set, or leave it out"
            )
        for name, least in (("samples", 1), ("seq_len", 2), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"calibration needs {name} >= {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration samples and what they are.

    Attributes:
        tokens: (samples, seq_len) int64, on the CPU, in random order.
        description: for the report, JSON-able: source, kind, samples, seq_len, tokens, seed, sha256 of the tokens, how
            the text was made or read and, with a tokenizer, how the first sample begins: 200 characters as the model
            reads them, special tokens included.
    """

    tokens: Tensor
    description: Mapping[str, Any]


def check_records(spec: CalibrationSpec) -> None:
    """Tell before any work is done that the records of a local file cannot be used; other sources are not opened.

    Raises:
        CalibrationError: the file cannot be read, or which field of its first record is text is not clear.
        UsageError: there is a `text_field`, and the file has no records.
    """
    path = expand_user(spec.source)
    if not path.is_file():
        if spec.source != "self":
            _data_set_name(spec)
        return
    if path.suffix.lower() in _RECORDS:
        where, record = next(_records(path))
        record_form(record, where, spec.text_field).read(record, where)
    elif path.suffix.lower() != ".parquet":
        _refuse_field(spec, path)


def _data_set_name(spec: CalibrationSpec) -> tuple[str, str, bool]:
    """Name of a data set, what stands behind it, and whether it is a directory.

    Raises:
        CalibrationError: the source is neither a file nor could it be a data set.
    """
    name, _, rest = spec.source.partition(":")
    is_directory = expand_user(name).is_dir()
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name, re.ASCII) and Path(name).suffix not in _FILE_SUFFIXES
    if not (is_directory or is_hub_id):
        raise CalibrationError(f"calibration text {spec.source} does not exist; use self, a file or a data set id")
    return name, rest, is_directory


def _refuse_field(spec: CalibrationSpec, path: Path) -> None:
    if spec.text_field is not None:
        raise UsageError(
            f"text_field {spec.text_field!r} is for records, and {path} is read as plain text: leave it out, or write "
            "one object a line to a .jsonl file"
        )


def texts_of(program: Program, spec: CalibrationSpec, device: torch.device | str) -> CalibrationSet:
    """Calibration samples for a program of a Hugging Face model, by its own tokenizer; `"self"` samples from it.

    Raises:
        CalibrationError, UsageError: as for `calibration_set`.
    """
    assert program.source is not None
    return calibration_set(
        spec,
        tokenizer=program.source.tokenizer,
        runner=text_maker(program) if program.interface.causal else None,
        config=program.source.config,
        device=device,
    )


def calibration_set(
    spec: CalibrationSpec,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    runner: Runner | None = None,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
) -> CalibrationSet:
    """Make calibration samples. The global random state is neither used nor changed.

    Text is tokenised without special tokens, chats with those that the chat template writes. Documents are joined with
    the end-of-text token between them (a chat that ends in it gets no second one) and cut into windows without overlap,
    and windows are drawn at random without replacement.

    Args:
        spec: what is wanted.
        tokenizer: the model's own; needed for text, and tells `"self"` the token to start from.
        runner: the model; needed for `"self"`.
        config: the model's configuration: its limits are checked, and it stands in for a missing tokenizer.
        device: where the runner wants its inputs.

    Raises:
        CalibrationError: the text is missing, unreadable, empty or too short, does not fit the model's vocabulary, or
            the model returned numbers that are not finite.
        UsageError: `seq_len` is longer than the model's positions, or what the source needs was not given.
    """
    limit = None if config is None else max_positions(config)
    if limit is not None and spec.seq_len > limit:
        raise UsageError(f"calibration seq_len {spec.seq_len} is longer than the model's {limit} positions")
    if spec.source == "self":
        if runner is None:
            raise UsageError("calibration text from the model itself needs the model; give a runner, or name a file")
        generator = torch.Generator().manual_seed(spec.seed)
        start, kind = _start_tokens(spec, tokenizer, config, generator)
        tokens = sample_from_model(
            runner, start, spec.seq_len, generator=generator, batch_size=spec.batch_size, device=device
        )
        details = {"kind": "sampled from the model", "start": kind, "temperature": 1.0}
    else:
        if tokenizer is None:
            raise UsageError(
                f"calibration text from {spec.source} needs a tokenizer (tokenizer= in Python); the model has none"
            )
        tokens, details = _windows_of_text(spec, tokenizer)
    vocabulary = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"calibration token {int(tokens.max())} is outside the model's vocabulary of {vocabulary}; use the model's "
            f"own tokenizer"
        )
    description = {"source": spec.source, "samples": spec.samples, "seq_len": spec.seq_len, "tokens": tokens.numel()}
    description |= {"seed": spec.seed, "sha256": hash_tokens(tokens), **details}
    return CalibrationSet(tokens, description | ({} if tokenizer is None else {"begins": _begins(tokens, tokenizer)}))


def _begins(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first characters of the first sample, as the model reads them."""
    # A token may have no character of its own, so more of them are decoded than are shown.
    text = tokenizer.decode(tokens[0, : 4 * _SHOWN], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)[:_SHOWN]


def held_out_windows(
    spec: CalibrationSpec,
    windows: int,
    length: int,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    runner: Runner | None = None,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Text like the calibration samples of which these use nothing: other windows of the same pool, or newly sampled.

    Args:
        spec: what the calibration samples were made with.
        windows: how many are wanted.
        length: tokens of each, at most `spec.seq_len`; of longer windows the first ones.
        tokenizer: see `calibration_set`, as the rest.
        runner: see `calibration_set`.
        config: see `calibration_set`.
        device: see `calibration_set`.

    Returns:
        (up to `windows`, length) int64 on the CPU: as many as the source has left.

    Raises:
        CalibrationError: the text is missing, unreadable, or too short for the calibration samples.
        UsageError: `length` is out of range, or what the source needs was not given.
    """
    if windows < 1 or not 2 <= length <= spec.seq_len:
        raise UsageError(
            f"held-out text needs at least 1 window of 2 to {spec.seq_len} tokens, got {windows}, {length}"
        )
    if spec.source == "self":
        # A seed of its own: the calibration samples' would give their beginnings again.
        seed = int.from_bytes(hashlib.sha256(f"held out {spec.seed}".encode()).digest()[:7], "little")
        asked = dataclasses.replace(spec, samples=windows, seq_len=length, seed=seed)
        made = calibration_set(asked, tokenizer=tokenizer, runner=runner, config=config, device=device)
        return made.tokens
    if tokenizer is None:
        raise UsageError(
            f"calibration text from {spec.source} needs a tokenizer (tokenizer= in Python); the model has none"
        )
    pool, order, _ = _pool_of_text(spec, tokenizer)
    return pool[order[spec.samples : spec.samples + windows], :length].contiguous()


def sample_from_model(
    runner: Runner,
    start: Tensor,
    seq_len: int,
    *,
    generator: torch.Generator,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sample sequences from a model at temperature 1, over its whole vocabulary.

    The end-of-text token is a token like any other: the model goes on to the next document. Each token is drawn by
    inverting the cumulative distribution at a uniform number; all of these are drawn beforehand, so the batch size and
    the device change the outcome only where rounding does.

    Args:
        runner: the model.
        start: (samples,) int64, the first token of each sequence.
        seq_len: tokens of each sequence, the first one included.
        generator: on the CPU.
        batch_size: sequences sampled at once.
        device: where the runner wants its inputs.

    Returns:
        (samples, seq_len) int64 on the CPU.

    Raises:
        CalibrationError: the model's logits are not finite.
    """
    uniform = torch.rand(len(start), seq_len, generator=generator, dtype=torch.float64)
    sampled = torch.empty(len(start), seq_len, dtype=torch.int64)
    sampled[:, 0] = start
    batches = [slice(first, first + batch_size) for first in range(0, len(start), batch_size)]
    with _progress() as progress:
        task = progress.add_task("sampling calibration text", total=len(batches) * (seq_len - 1))
        for batch in batches:
            mask = torch.ones_like(sampled[batch], device=device)
            past = None
            for length in range(1, seq_len):
                seen = mask[:, :length]
                new = sampled[batch, length - 1 : length].to(device)
                logits, past = runner.step(new, seen, position_ids_from_mask(seen, 1), past)
                try:
                    sampled[batch, length] = _draw(logits[:, -1], uniform[batch, length], runner.name)
                except NotFiniteError as error:
                    raise NotFiniteError(str(error), sampled[batch, :length].to(device)) from error
                progress.advance(task)
    return sampled


def _draw(logits: Tensor, uniform: Tensor, name: str) -> Tensor:
    """Draw one token a row: logits (batch, vocabulary), uniform (batch,) float64 in [0, 1) -> (batch,) int64."""
    cumulative = logits.float().cpu().softmax(-1).double().cumsum(-1)
    if not bool(torch.isfinite(cumulative[:, -1]).all()):
        raise NotFiniteError(
            f"{name} returned logits that are not finite while sampling text; load the model in bfloat16 or float32"
        )
    # right=True: a token of probability 0 is never drawn, not even by a uniform number of exactly 0.
    found = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


def _start_tokens(
    spec: CalibrationSpec,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PreTrainedConfig | None,
    generator: torch.Generator,
) -> tuple[Tensor, str]:
    """The first token of each sequence: the one that begins a text, or ends one, or random ones if there is neither."""
    for field in ("bos_token_id", "eos_token_id"):
        for owner in (tokenizer, None if config is None else config.get_text_config()):
            token = getattr(owner, field, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return torch.full((spec.samples,), token, dtype=torch.int64), f"{field} {token}"
    if config is None and tokenizer is None:
        raise UsageError("calibration text from the model itself needs its tokenizer or its configuration to start")
    vocabulary = len(tokenizer) if tokenizer is not None else config.get_text_config().vocab_size  # type: ignore[union-attr]
    return torch.randint(vocabulary, (spec.samples,), generator=generator), "random tokens"


def _windows_of_text(spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, dict[str, Any]]:
    """Tokenise a source's documents, cut them and choose windows: (samples, seq_len) int64, and how it was done."""
    pool, order, details = _pool_of_text(spec, tokenizer)
    return pool[order[: spec.samples]], details


def _pool_of_text(spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The windows to choose from (windows, seq_len) int64, a random order of them, and how they were made."""
    generator = torch.Generator().manual_seed(spec.seed)
    documents, details = _open(spec, tokenizer, generator)
    chats = details.get("format") == _CHATS
    needed = spec.samples * spec.seq_len
    eos = tokenizer.eos_token_id
    pool: list[int] = []
    count = 0
    with _progress() as progress:
        task = progress.add_task("reading calibration text", total=_POOL * needed)
        for batch in _batches(documents):
            # verbose=False: no warning about texts longer than the model's context, they are cut afterwards.
            for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                if pool and eos is not None and not (chats and pool[-1] == eos):
                    pool.append(eos)
                pool += ids
                count += 1
            progress.update(task, completed=len(pool))
            if len(pool) >= _POOL * needed:
                break
    windows = len(pool) // spec.seq_len
    if windows < spec.samples:
        raise CalibrationError(
            f"calibration text {spec.source} has {len(pool)} tokens in {count} documents, which makes {windows} "
            f"windows; {spec.samples} samples of {spec.seq_len} tokens need {needed}: use a longer text, or fewer or "
            f"shorter samples"
        )
    order = torch.randperm(windows, generator=generator)
    tokens = torch.tensor(pool[: windows * spec.seq_len], dtype=torch.int64).reshape(windows, spec.seq_len)
    separator = "nothing (the tokenizer has no end-of-text token)" if eos is None else f"eos_token_id {eos}"
    return tokens, order, {**details, "documents_read": count, "tokens_read": len(pool), "separator": separator}


def _open(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> tuple[Iterable[str], dict[str, Any]]:
    """The documents of a source that is not the model, in random order, and what kind it is."""
    path = expand_user(spec.source)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in _RECORDS:
        form, contents = _read_records(path, spec.text_field)
        require_template(form, tokenizer, str(path))
        order = torch.randperm(len(contents), generator=generator).tolist()
        documents = documents_of((contents[index] for index in order), tokenizer)
        return documents, {"kind": f"{suffix.removeprefix('.')} file", **_described(form)}
    if path.is_file() and suffix == ".parquet":
        return _open_data_set(spec, tokenizer, "parquet", None, "train", files=str(path))
    if path.is_file():
        _refuse_field(spec, path)
        return [read_text(path)], {"kind": "text file"}
    name, rest, is_directory = _data_set_name(spec)
    configuration, _, split = rest.partition(":")
    where = str(expand_user(name)) if is_directory else name
    return _open_data_set(spec, tokenizer, where, configuration or None, split or "train")


def _described(form: RecordForm) -> dict[str, str]:
    return {"field": ", ".join(form.fields), "format": _CHATS if form.is_chat else "plain text"}


def _read_records(path: Path, text_field: str | None) -> tuple[RecordForm, list[tuple[str, str | Chat]]]:
    """The form of a file's records; and where each record is, with its text or messages, of those that say anything."""
    form: RecordForm | None = None
    contents: list[tuple[str, str | Chat]] = []
    for where, record in _records(path):
        form = form or record_form(record, where, text_field)
        content = form.read(record, where)
        if content is not None:
            contents.append((where, content))
    if form is None or not contents:
        raise CalibrationError(f"{path}: field {(form.fields[0] if form else 'text')!r} is empty in every record")
    return form, contents


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a file of JSON lines or of a JSON list, and where each is."""
    text = read_text(path)
    if path.suffix.lower() == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise CalibrationError(f"{path}: not JSON ({error}); one object a line needs the suffix .jsonl") from error
        if not isinstance(found, list) or not found:
            raise CalibrationError(f"{path}: expected a list of records; write one object a line to a .jsonl file")
        yield from ((f"{path}, record {number}", record) for number, record in enumerate(found, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{path}, line {number}: not JSON ({error})") from error
        yield f"{path}, line {number}", record


def _open_data_set(
    spec: CalibrationSpec,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    configuration: str | None,
    split: str,
    *,
    files: str | None = None,
) -> tuple[Iterable[str], dict[str, Any]]:
    """Stream a data set from the hub, a local directory or a file, in an order shuffled by the seed."""
    if importlib.util.find_spec("datasets") is None:
        start = "reading parquet" if files else "there is no such file, and reading data sets"
        raise CalibrationError(
            f'calibration text {spec.source}: {start} needs a package: pip install "fxprune[datasets]"'
        )
    import datasets  # noqa: PLC0415 - an optional package, and slow to import

    failures = (OSError, ValueError, RuntimeError, KeyError, TypeError, datasets.exceptions.DatasetsError)
    what = f"calibration data set {files or name!r} (configuration {configuration or 'default'}, split {split})"
    try:
        rows = datasets.load_dataset(name, configuration, data_files=files, split=split, streaming=True)
        rows = rows.shuffle(seed=spec.seed, buffer_size=_SHUFFLE_BUFFER)
        first = next(iter(rows), None)
    except failures as error:
        raise CalibrationError(f"{what} cannot be read: {error}") from error
    if first is None:
        raise CalibrationError(f"{what} is empty")
    form = record_form(first, f"{what}, row 0 of the shuffled stream", spec.text_field)
    require_template(form, tokenizer, what)

    def contents() -> Iterator[tuple[str, str | Chat]]:
        try:
            for number, row in enumerate(rows):
                where = f"{what}, row {number} of the shuffled stream"
                content = form.read(row, where)
                if content is not None:
                    yield where, content
        except failures as error:
            raise CalibrationError(f"{what} cannot be read: {error}") from error

    named = {"name": name, "configuration": configuration, "split": split} if files is None else {}
    details = {"kind": "parquet file" if files else "data set", **named, **_described(form)}
    return documents_of(contents(), tokenizer), {key: value for key, value in details.items() if value is not None}


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _DOCUMENTS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _progress() -> Progress:
    """A progress bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
