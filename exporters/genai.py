"""onnxruntime-genai: its configuration beside an exported graph, and a runner that makes text with it.

    DIR/model.onnx  genai_config.json  tokenizer.json ...     og.Model(DIR)

The configuration's type is `decoder`, the runtime's form for any decoder, so nothing depends on the architecture's
name. Numbers of heads are the largest of a layer; the runtime takes each layer's own from the graph, so
layers may differ. The package is optional: `pip install 'fxprune[genai]'`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch import Tensor

from fxprune.core.errors import ExportError, UsageError
from fxprune.core.output import write_json
from fxprune.exporters.onnx_files import check_external_data, graph_file
from fxprune.models.loading import max_positions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fxprune.core.program import Source
    from fxprune.runtimes.runners import Past

__all__ = ["CONFIG_NAME", "GenaiRunner", "require_genai", "write_genai_config"]

CONFIG_NAME = "genai_config.json"
_POSITIONS = 32768
"""Context length of a model that has no limit of its own (ALiBi)."""
_NATIVE = re.compile(r"\.(so|dll|dylib|pyd)(\.[\d.]+)?$", re.IGNORECASE)
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "min_length")
"""What a generation config and the runtime's search options call by the same name."""


def require_genai() -> Any:
    """The package `onnxruntime_genai`, with its telemetry off.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import onnxruntime_genai  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ExportError(
            "onnxruntime-genai is not installed; install the extra: pip install 'fxprune[genai]'"
        ) from error
    silence = getattr(onnxruntime_genai, "disable_telemetry_events", None)
    if silence is not None:
        silence()
    return onnxruntime_genai


# ── Configuration ─────────────────────────────────────────────────────────────────────────────────────────────────


def write_genai_config(directory: str | Path, source: Source) -> Path:
    """Write `genai_config.json` beside an exported graph.

    Args:
        directory: holds `model.onnx`.
        source: the model that the graph came from, for its special tokens and its limit of positions.

    Returns:
        The file.

    Raises:
        ExportError: the graph is missing, has no cache, or the model has no end-of-text token.
    """
    graph = graph_file(directory)
    model = onnx.load(graph, load_external_data=False).graph
    inputs = {value.name: _shape(value) for value in model.input}
    outputs = {value.name: _shape(value) for value in model.output}
    layers = sum(name.endswith(".key") for name in inputs)
    if "logits" not in outputs or not layers:
        raise ExportError(f"{graph} is not a causal language model with a cache, which onnxruntime-genai needs")
    ends = require_end_of_text(source)
    config = source.config.get_text_config()
    keys = [inputs[f"past_key_values.{layer}.key"] for layer in range(layers)]
    length = max_positions(source.config) or _POSITIONS
    given = [name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs]
    data: dict[str, Any] = {
        "model": {
            "type": "decoder",
            "vocab_size": outputs["logits"][-1],
            "context_length": length,
            "bos_token_id": _token(source, "bos_token_id", ends[0]),
            "eos_token_id": ends,
            "pad_token_id": _token(source, "pad_token_id", ends[0]),
            "decoder": {
                "filename": graph.name,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": config.hidden_size,
                "head_size": max(key[3] for key in keys),
                "num_attention_heads": _most(config, "num_attention_heads"),
                "num_key_value_heads": max(key[1] for key in keys),
                "num_hidden_layers": layers,
                "inputs": {
                    **{name: name for name in given},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {**_search(source), "max_length": length, "past_present_share_buffer": False},
    }
    path = graph.with_name(CONFIG_NAME)
    write_json(path, data)
    return path


def _most(config: Any, field: str) -> int:
    """The largest value of a field that layers may have for themselves."""
    if config.is_heterogeneous:
        return max(int(getattr(layer, field)) for layer in config.per_layer_config)
    return int(getattr(config, field))


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    """The extents, 0 for those that may change."""
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def require_end_of_text(source: Source) -> list[int]:
    """The tokens that end a text.

    Raises:
        ExportError: the model names none.
    """
    ends = _ends(source)
    if not ends:
        raise ExportError(f"{source.name} names no end-of-text token; set eos_token_id in its generation_config.json")
    return ends


def _owners(source: Source) -> list[Any]:
    return [owner for owner in (source.generation_config, source.config.get_text_config()) if owner is not None]


def _ends(source: Source) -> list[int]:
    for owner in _owners(source):
        found = getattr(owner, "eos_token_id", None)
        if found is not None:
            return [int(token) for token in (found if isinstance(found, list | tuple) else [found])]
    return []


def _token(source: Source, name: str, otherwise: int) -> int:
    for owner in (*_owners(source), source.tokenizer):
        found = getattr(owner, name, None)
        if isinstance(found, int):
            return found
    return otherwise


def _search(source: Source) -> dict[str, Any]:
    """The search options that the model's generation config sets; greedy where it says nothing."""
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    for name in _SEARCH:
        value = getattr(source.generation_config, name, None)
        if value is not None:
            options[name] = value
    return options


# ── Runner ────────────────────────────────────────────────────────────────────────────────────────────────────────


class GenaiRunner:
    """Makes text with onnxruntime-genai; a `fxprune.runtimes.runners.Runner` for sequences without padding.

    The runtime keeps its cache to itself. The `Past` of this runner is therefore one tensor, the tokens seen so far:
    a step that goes on where the last one ended costs one step, any other computes the past again.

    Attributes:
        name: how reports call it.
        path: the graph.
        ends: the end-of-text tokens.
        vocabulary: how many tokens there are.
        tokenizer: the runtime's own tokenizer, made when first used.
    """

    def __init__(self, directory: str | Path, *, threads: int | None = None, name: str = "onnxruntime-genai") -> None:
        """Load a directory that `write_genai_config` completed.

        Args:
            directory: holds `genai_config.json`, the graph and, for text, the tokenizer.
            threads: intra-op threads; None leaves it to ONNX Runtime.
            name: how reports call the runner.

        Raises:
            ExportError: the package is not installed, a file is missing or damaged, or the runtime refuses the graph.
        """
        og = require_genai()
        directory = Path(directory).expanduser()
        self.name = name
        config = _read_config(directory / CONFIG_NAME)
        self.path = graph_file(directory / config["model"]["decoder"]["filename"])
        check_external_data(self.path)
        ends = config["model"]["eos_token_id"]
        self.ends = tuple(ends if isinstance(ends, list) else [ends])
        self.vocabulary = int(config["model"]["vocab_size"])
        self._limit = int(config["model"]["context_length"])
        self._og, self._directory = og, directory
        self._tokenizer: Any = None
        self._generator: Any = None
        self._seen = torch.empty(1, 0, dtype=torch.long)
        try:
            loaded = og.Config(str(directory))
            if threads is not None:
                options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
                loaded.overlay(json.dumps(options))
            self._model = og.Model(loaded)
        except Exception as error:  # the package raises bare RuntimeErrors and its own types
            raise ExportError(f"onnxruntime-genai cannot load {directory}: {error}; export it again") from error

    @property
    def tokenizer(self) -> Any:
        """The runtime's own tokenizer.

        Raises:
            ExportError: there is none beside the graph, or the runtime does not know its kind.
        """
        if self._tokenizer is None:
            try:
                self._tokenizer = self._og.Tokenizer(self._model)
            except Exception as error:  # as above
                raise ExportError(
                    f"onnxruntime-genai cannot use the tokenizer in {self._directory}: {error}; use --to onnx, and "
                    "tokenise with transformers"
                ) from error
        return self._tokenizer

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """See `Runner.step`; the past that comes back is the tokens seen.

        Raises:
            UsageError: the mask hides a token, or positions do not count from 0: the runtime makes both itself; or
                several sequences are to go on, which the runtime does with tokens of its own choice only.
            ExportError: the runtime fails.
        """
        seen = input_ids[:, :0] if past is None else past[0]
        whole = torch.cat([seen, input_ids], dim=1)
        expected = torch.arange(seen.shape[1], whole.shape[1])
        if not bool(attention_mask.all()) or not bool((position_ids.cpu() == expected).all()):
            raise UsageError("onnxruntime-genai makes masks and positions itself: give sequences without padding")
        if seen.shape[1] and whole.shape[0] > 1:
            raise UsageError("onnxruntime-genai continues one sequence at a time with given tokens; use batch 1")
        if past is None or self._generator is None or not torch.equal(self._seen, seen):
            self._start(whole.shape[0])
            self._append(whole)
        else:
            self._append(input_ids)
        self._seen = whole
        logits = torch.from_numpy(np.asarray(self._generator.get_output("logits")))
        return logits[:, -input_ids.shape[1] :], [whole]

    def fork(self, past: Past) -> Past:
        """Make the runtime's cache hold this past, computed again, so that the next step costs one step."""
        self._start(past[0].shape[0])
        self._append(past[0])
        self._seen = past[0]
        return [past[0]]

    def generate(self, input_ids: Tensor, new_tokens: int) -> Tensor:
        """Greedy text: the runtime chooses the tokens itself, and ends at an end-of-text token.

        Args:
            input_ids: (1, prompt) int64.
            new_tokens: the most tokens to add.

        Returns:
            The new tokens, (1, up to `new_tokens`) int64, the end-of-text token included.

        Raises:
            ExportError: the runtime fails.
        """
        made = list(self._tokens(input_ids, new_tokens))
        return torch.tensor([made], dtype=torch.long)

    def stream(self, prompt: str, new_tokens: int) -> Iterator[str]:
        """Greedy text after a prompt, piece by piece as it is made, without the end-of-text token.

        Raises:
            ExportError: there is no tokenizer that the runtime can use, or it fails.
        """
        ids = torch.tensor([[int(token) for token in self.tokenizer.encode(prompt)]])
        pieces = self.tokenizer.create_stream()
        for token in self._tokens(ids, new_tokens):
            if token not in self.ends:
                yield pieces.decode(token)

    def _tokens(self, input_ids: Tensor, new_tokens: int) -> Iterator[int]:
        if input_ids.shape[0] != 1:
            raise UsageError(f"text is made for one sequence at a time, not for {input_ids.shape[0]}")
        self._start(1, max_length=min(self._limit, input_ids.shape[1] + new_tokens))
        self._append(input_ids)
        self._seen = input_ids[:, :0]  # what follows is chosen by the runtime: no step may go on from here
        while not self._generator.is_done():
            self._call("generate_next_token")
            yield int(self._generator.get_next_tokens()[0])

    def _start(self, batch: int, *, max_length: int | None = None) -> None:
        params = self._og.GeneratorParams(self._model)
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        options |= {"no_repeat_ngram_size": 0, "min_length": 0}
        params.set_search_options(batch_size=batch, max_length=max_length or self._limit, **options)
        self._generator = self._og.Generator(self._model, params)

    def _append(self, tokens: Tensor) -> None:
        if tokens.shape[1]:
            self._call("append_tokens", np.ascontiguousarray(tokens.cpu().numpy().astype(np.int32)))

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._generator, method)(*arguments)
        except Exception as error:  # the package raises bare RuntimeErrors and its own types
            raise ExportError(f"onnxruntime-genai failed in {method} on {self.path}: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
        model = config["model"]
        filename = model["decoder"]["filename"]
        known = isinstance(filename, str) and Path(filename).name == filename
        ends = model["eos_token_id"] if isinstance(model["eos_token_id"], list) else [model["eos_token_id"]]
        known = known and all(type(number) is int for number in (*ends, model["context_length"], model["vocab_size"]))
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing; export with `fxprune export --to genai`") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} cannot be read: {type(error).__name__}: {error}; export again") from error
    if not known:
        raise ExportError(
            f"{path}: eos_token_id, context_length or vocab_size is no number, or it names no file beside it; "
            "export again"
        )
    if (code := next(_libraries(config), None)) is not None:
        raise ExportError(
            f"{path} asks the runtime to load a library ({code}), and nothing that comes with a model is ever run; "
            "remove the entry, or export again"
        )
    return config


def _libraries(value: Any, key: str = "") -> Iterator[str]:
    """What in a configuration may name native code: custom operators, execution providers of one's own."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _libraries(child, str(name))
    elif isinstance(value, list):
        for child in value:
            yield from _libraries(child, key)
    elif isinstance(value, str) and ("library" in key.lower() or _NATIVE.search(value)):
        yield f"{key}: {value[:80]}"
