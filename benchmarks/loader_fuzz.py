"""Mutations of checkpoints: the loader gives a typed error or the right model, whatever is done to the files.

Tiny checkpoints of every kind (uniform, mixed, sharded, with bfloat16, without some layers) are written once. Each
seed takes a copy of one, changes `fxprune.json`, `config.json`, the index or a safetensors file, in bytes or in
content, and loads it.

    python -m benchmarks.loader_fuzz --json benchmarks/results/loader_fuzz.json

Two kinds of damage are told apart. *Plain*: the file is changed and no more, as by a bad disk, a hand that edits or two
checkpoints that were mixed up; then no other model than the saved one may come out. *Sealed anew*: all hashes are made
to fit the change, as somebody would who knows the format. Nothing can tell such a checkpoint from one that was meant to
be so; it may be another model, but loading it must still end in a model or in a typed error, in bounded time.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fxprune.checkpoints.checkpoint import load, save
from fxprune.core.errors import CheckpointError
from fxprune.core.output import write_json
from fxprune.core.program import Source
from fxprune.models.manifest import MANIFEST_NAME, Manifest, write_manifest
from fxprune.models.shards import hash_file

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["Outcome", "Subject", "fuzz_one", "subjects"]

TIME_LIMIT = 20
"""Seconds for one load, of which a sound one takes a fraction."""

IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [2, 7, 1, 8, 28, 1]])
_LLAMA: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 41,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Subject:
    """A sound checkpoint.

    Attributes:
        name: for the record.
        directory: where it is; it is never changed.
        logits: what its model gives for the ids.
    """

    name: str
    directory: Path
    logits: Tensor


@dataclass(frozen=True)
class Outcome:
    """What came of one mutation.

    Attributes:
        seed: from which everything follows.
        subject: name of the checkpoint.
        file: what was changed.
        mutation: how.
        result: `error` (typed), `same` (the saved model), `other` (another model), `untyped` (another exception) or
            `time` (too long).
        detail: the exception, where there was one.
    """

    seed: int
    subject: str
    file: str
    mutation: str
    result: str
    detail: str = ""


def logits_of(model: PreTrainedModel) -> Tensor:
    """Logits for the ids."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found.float()


def subjects(root: Path, names: Container[str] | None = None) -> list[Subject]:
    """Write the sound checkpoints, all of them or those of some names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = LlamaForCausalLM(LlamaConfig(**_LLAMA)).eval()
        tied = LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True)).to(torch.bfloat16).eval()
        gpt2 = GPT2LMHeadModel(GPT2Config(**_GPT2)).eval()
    uniform = {f"model.layers.{i}.mlp": 16 for i in range(3)}
    mixed = {"model.layers.0.mlp": 8, "model.layers.2.mlp": 16}
    recipes: dict[str, tuple[PreTrainedModel, dict[str, int], dict[str, Any]]] = {
        "uniform": (llama, uniform, {}),
        "mixed": (llama, mixed, {}),
        "sharded": (llama, mixed, {"max_shard_size": 20_000}),
        "fewer-layers": (tied, uniform, {"without": 1}),
        "conv1d": (gpt2, {"transformer.h.0.mlp": 40}, {}),
    }
    return [
        _written(root / name, model, widths, **options)
        for name, (model, widths, options) in recipes.items()
        if names is None or name in names
    ]


def _written(
    directory: Path, model: PreTrainedModel, widths: dict[str, int], *, without: int | None = None, **options: Any
) -> Subject:
    """Keep the first channels of some MLPs, leave out a layer, and save."""
    tensors = {
        name: _cut(name, tensor, widths)
        for name, tensor in model.state_dict().items()
        if without is None or f".layers.{without}." not in name
    }
    source = Source("tiny", model.config, type(model), generation_config=model.generation_config)
    save(tensors, directory, source=source, plan={"widths": widths}, history=[{"name": "first"}], **options)
    return Subject(directory.name, directory, logits_of(load(directory)))


def _cut(name: str, tensor: Tensor, widths: dict[str, int]) -> Tensor:
    axis_of = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
    axis_of |= {"c_fc.weight": 1, "c_fc.bias": 0, "c_proj.weight": 0}
    for mlp, width in widths.items():
        if name.startswith(f"{mlp}.") and name.removeprefix(f"{mlp}.") in axis_of:
            return tensor.narrow(axis_of[name.removeprefix(f"{mlp}.")], 0, width)
    return tensor


# ── Mutations ─────────────────────────────────────────────────────────────────────────────────────────────────────

_HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "..",
    "../../etc/passwd",
    "/dev/zero",
    "model.safetensors\x00",
    "owner/kernel",
    "float32",
    "int8",
    "a" * 10_000,
    [],
    [[[]]],
    {},
    {"a": {"b": 1}},
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in JSON data."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _places(child, (*path, key))


def _owner(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def _nudged(value: Any, rng: random.Random) -> Any:
    """Something of the same type that is near, which is what a schema does not see."""
    if isinstance(value, (int, float)):
        near = [value * 2, value // 2, -value, value + 1, value - 1, value + 8]
        return not value if isinstance(value, bool) else rng.choice(near)
    if isinstance(value, str) and value:
        spot = rng.randrange(len(value))
        letters = "abcdef0123456789_./"
        return rng.choice([value[:spot] + rng.choice(letters) + value[spot + 1 :], value[:spot], value + "x"])
    if isinstance(value, list) and value:
        return rng.choice([value[1:], value + value[-1:], value[::-1]])
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return {k: v for k, v in value.items() if k != key}
    return rng.choice(_HOSTILE)


def _change_json(data: Any, rng: random.Random) -> str:
    """Change JSON data in place; returns what was done."""
    places = list(_places(data))
    path = rng.choice(places)
    owner, key = _owner(data, path), path[-1]
    where = ".".join(map(str, path))[:120]
    kind = rng.choice(["nudge", "nudge", "nudge", "hostile", "delete", "swap", "add"])
    if kind == "delete":
        del owner[key]
    elif kind == "hostile":
        owner[key] = rng.choice(_HOSTILE)
        where += f" = {str(owner[key])[:40]!r}"
    elif kind == "swap":
        other = rng.choice(places)
        if other[: len(path)] == path or path[: len(other)] == other:
            return "swap of a thing with itself"
        second = _owner(data, other)
        owner[key], second[other[-1]] = second[other[-1]], owner[key]
        where += f" with {'.'.join(map(str, other))[:120]}"
    elif kind == "add":
        name = rng.choice(["surprise", "auto_map", "attn_implementation", "quantization_config", "../x", "dtype"])
        target = owner if isinstance(owner, dict) else data
        target[name] = rng.choice(_HOSTILE)
        where = f"{name} = {str(target[name])[:40]!r}"
    else:
        owner[key] = _nudged(owner[key], rng)
        where += f" = {str(owner[key])[:40]!r}"
    return f"{kind} {where}"


def _change_bytes(content: bytes, rng: random.Random, end: int) -> tuple[bytes, str]:
    """Change bytes before `end`."""
    kind = rng.choice(["flip", "flip", "flip", "truncate", "insert", "cut", "zero", "length"])
    at = rng.randrange(max(1, min(end, len(content))))
    if kind == "flip":
        changed = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    elif kind == "truncate":
        changed = content[:at]
    elif kind == "insert":
        changed = content[:at] + rng.randbytes(rng.randint(1, 16)) + content[at:]
    elif kind == "cut":
        changed = content[:at] + content[at + rng.randint(1, 16) :]
    elif kind == "zero":
        length = min(rng.randint(1, 64), len(content) - at)
        changed = content[:at] + bytes(length) + content[at + length :]
    else:
        changed = struct.pack("<Q", rng.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])) + content[8:]
    return changed, f"{kind} at {at}"


def _mutate_text(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    if rng.random() < 0.2:
        changed, how = _change_bytes(content, rng, len(content))
        path.write_bytes(changed)
        return how
    data = json.loads(content)
    how = "; ".join(_change_json(data, rng) for _ in range(rng.choice([1, 1, 2])))
    path.write_text(json.dumps(data), encoding="utf-8")
    return how


def _mutate_weights(path: Path, rng: random.Random) -> str:
    """Change a safetensors file: its header as JSON or as bytes, or rarely its data."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    roll = rng.random()
    if roll < 0.6:
        header = json.loads(content[8:end])
        how = "; ".join(_change_json(header, rng) for _ in range(rng.choice([1, 1, 2])))
        packed = json.dumps(header).encode()
        packed += b" " * (-len(packed) % 8)
        path.write_bytes(struct.pack("<Q", len(packed)) + packed + content[end:])
        return f"header: {how}"
    changed, how = _change_bytes(content, rng, end if roll < 0.9 else len(content))
    path.write_bytes(changed)
    return how


def _mutate_files(directory: Path, rng: random.Random) -> tuple[str, str]:
    """Remove a file, or swap two."""
    files = sorted(path for path in directory.iterdir() if path.name != "generation_config.json")
    first = rng.choice(files)
    if rng.random() < 0.5:
        first.unlink()
        return first.name, "removed"
    second = rng.choice([path for path in files if path != first])
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return first.name, f"swapped with {second.name}"


def _mutate(directory: Path, rng: random.Random) -> tuple[str, str]:
    """Change one thing in a checkpoint; returns the file and what was done."""
    target = rng.choices(["manifest", "config", "weights", "index", "files"], [40, 25, 25, 5, 5])[0]
    weights = sorted(directory.glob("*.safetensors"))
    index = sorted(directory.glob("*.index.json"))
    if target == "files":
        return _mutate_files(directory, rng)
    if target == "weights" or (target == "index" and not index):
        path = rng.choice(weights)
        return path.name, _mutate_weights(path, rng)
    path = {"manifest": directory / MANIFEST_NAME, "config": directory / "config.json"}.get(target) or index[0]
    return path.name, _mutate_text(path, rng)


def reseal(directory: Path) -> None:
    """Make every hash of a checkpoint fit its files, where `fxprune.json` can be read at all.

    Raises:
        ValueError, OSError, CheckpointError: it cannot, or its files are gone.
    """
    manifest = Manifest.model_validate_json((directory / MANIFEST_NAME).read_bytes())
    files = {name: hash_file(directory / name) for name in manifest.files}
    write_manifest(directory, manifest.model_copy(update={"files": files}))


# ── Outcomes ──────────────────────────────────────────────────────────────────────────────────────────────────────


class _TooLongError(Exception):
    pass


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLongError

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def fuzz_one(sound: Sequence[Subject], seed: int, scratch: Path, *, sealed: bool = False) -> Outcome:
    """Damage one checkpoint and load it.

    Args:
        sound: the checkpoints.
        seed: of every choice.
        scratch: an existing directory for the copy.
        sealed: whether all hashes are made to fit the damage.

    Returns:
        What came of it.
    """
    rng = random.Random(seed)  # noqa: S311 - no secret
    subject = rng.choice(sound)
    directory = scratch / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(subject.directory, directory)
    file, mutation = _mutate(directory, rng)
    if sealed:
        try:
            reseal(directory)
        except (ValueError, OSError, CheckpointError):
            mutation += " (cannot be sealed)"
    result, detail = _loaded(subject, lambda: load(directory))
    return Outcome(seed, subject.name, file, mutation, result, detail)


def _loaded(subject: Subject, attempt: Callable[[], PreTrainedModel]) -> tuple[str, str]:
    try:
        with _limited(TIME_LIMIT):
            model = attempt()
    except CheckpointError as error:
        return "error", str(error)
    except _TooLongError:
        return "time", f"more than {TIME_LIMIT} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "untyped", "".join(traceback.format_exception(error)[-3:])
    try:
        given = logits_of(model)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        return "other", f"cannot run: {error}"
    same = given.shape == subject.logits.shape and torch.equal(given, subject.logits)
    return ("same" if same else "other"), ""


def run(count: int, first: int, *, sealed: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Fuzz with `count` seeds from `first` on."""
    allowed = {"error", "same", "other"} if sealed else {"error", "same"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fxprune-fuzz-") as root:
        sound = subjects(Path(root))
        outcomes = []
        for seed in range(first, first + count):
            outcome = fuzz_one(sound, seed, Path(root), sealed=sealed)
            outcomes.append(outcome)
            if outcome.result not in allowed:
                say(f"seed {seed}: {outcome.subject}, {outcome.file}, {outcome.mutation}: {outcome.result}")
                say(outcome.detail)
    bad = [outcome.seed for outcome in outcomes if outcome.result not in allowed]
    return {
        "sealed_anew": sealed,
        "seeds": [first, first + count - 1],
        "results": dict(sorted(Counter(outcome.result for outcome in outcomes).items())),
        "by_file": {
            file: dict(sorted(Counter(o.result for o in outcomes if o.file == file).items()))
            for file in sorted({outcome.file for outcome in outcomes})
        },
        "not_allowed": bad,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> int:
    """Run both kinds; exit status 1 if anything came out that must not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="mutations of each kind")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    runs = [run(options.count, options.first, sealed=sealed, say=print) for sealed in (False, True)]
    for result in runs:
        kind = "sealed anew" if result["sealed_anew"] else "plain"
        print(f"{kind}: seeds {result['seeds']}, {result['results']}, {result['seconds']} s")
    if options.json:
        write_json(options.json, {"time_limit_s": TIME_LIMIT, "runs": runs})
    return 1 if any(result["not_allowed"] for result in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
