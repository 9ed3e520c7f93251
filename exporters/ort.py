"""ONNX Runtime: run an exported graph from torch tensors, without copies of the cache.

`OrtRunner` drives a causal language model with a cache, `OrtFunction` and `run_onnx` any graph.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.dlpack

from fxprune.core.errors import ExportError
from fxprune.runtimes.runners import rerun

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from fxprune.runtimes.runners import Past

__all__ = ["OrtFunction", "OrtRunner", "run_onnx"]

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}
_ADVICE = {
    "External data": "its weights file is not beside it, move the two together",
    "cannot get file size": "its weights file is not beside it, move the two together",  # as onnxruntime 1.22 says it
    "NOT_IMPLEMENTED": "the provider has no kernel for this data type, export the model in float32",
    "INVALID_PROTOBUF": "the file is damaged or no ONNX file, export the graph again",
}
"""What to do, by a part of ONNX Runtime's message."""
_CACHE_INPUT = re.compile(r"past_key_values\.(\d+)\.(key|value)")


class OrtRunner:
    """Runs an ONNX graph with a cache; a `fxprune.runtimes.runners.Runner`.

    Attributes:
        name: how reports call it.
        path: the `.onnx` file.
        load_seconds: wall time to load the file and optimise the graph.
        providers: the execution providers in use.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        name: str = "onnxruntime",
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        """Load a graph.

        Args:
            path: the `.onnx` file, its external data beside it.
            threads: intra-op threads; None leaves it to ONNX Runtime (one per core).
            name: how reports call the runner.
            providers: execution providers, best first.

        Raises:
            ExportError: the file or its external data is missing, the graph is invalid, a provider is not available,
                or the graph has no `input_ids`, no `logits`, or a cache input without its output.
        """
        self.name = name
        self.path = Path(path)
        start = time.perf_counter()
        self._session = _session(self.path, threads, providers)
        self.load_seconds = time.perf_counter() - start
        self.providers = tuple(self._session.get_providers())
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._past = sorted(filter(_CACHE_INPUT.fullmatch, self._inputs), key=_cache_order)
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        missing = [name for name in ("logits", *self._present) if name not in self._outputs]
        if missing or "input_ids" not in self._inputs:
            raise ExportError(
                f"{self.path} is not a causal language model with a cache: it has no "
                f"{(missing or ['input_ids'])[0]!r}; export one with fxprune.exporters.onnx.export_onnx"
            )

    def empty_past(self, batch: int) -> Past:
        """A cache of length 0, with each layer's own head count and head size."""
        return [_empty(self._inputs[name], batch) for name in self._past]

    @torch.no_grad()
    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        """See `Runner.step`; the cache that comes back lives in ONNX Runtime's memory and goes in again as it is."""
        if not self._past:
            return rerun(self._whole, input_ids, attention_mask, position_ids, past)
        past = self.empty_past(input_ids.shape[0]) if past is None else past
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        feeds = {name: tensor for name, tensor in given.items() if name in self._inputs}
        feeds |= dict(zip(self._past, past, strict=True))
        outputs = _run(self._session, feeds, ["logits", *self._present])
        return outputs[0], outputs[1:]

    def _whole(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Logits of whole sequences, of a graph without a cache."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        feeds = {name: tensor for name, tensor in given.items() if name in self._inputs}
        return _run(self._session, feeds, ["logits"])[0]


class OrtFunction:
    """Any graph as a function from named inputs to named outputs, on the CPU.

    Args:
        path: the `.onnx` file.
        threads: intra-op threads; None leaves it to ONNX Runtime.

    Attributes:
        path: the `.onnx` file.
        inputs: names of what it takes.
        outputs: names of what it gives.

    Raises:
        ExportError: the graph cannot be loaded.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.path = Path(path)
        self._session = _session(self.path, threads, ("CPUExecutionProvider",))
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name.

        Args:
            inputs: a tensor for each input; names that the graph does not have are an error.

        Raises:
            ExportError: the graph cannot be run, or an input is missing or unknown.
        """
        if set(self.inputs) != set(inputs):
            raise ExportError(
                f"{self.path} takes the inputs {sorted(self.inputs)}, but was given {sorted(inputs)}; give exactly "
                "those it takes"
            )
        return dict(zip(self.outputs, _run(self._session, inputs, self.outputs), strict=True))


def run_onnx(path: str | Path, inputs: Mapping[str, Tensor], *, threads: int | None = None) -> dict[str, Tensor]:
    """Run any graph once on the CPU; see `OrtFunction`."""
    return OrtFunction(path, threads=threads)(inputs)


def _session(path: Path, threads: int | None, providers: Sequence[str]) -> Any:
    import onnxruntime  # noqa: PLC0415 - heavy, and this module's other half is used without it

    if not path.is_file():
        raise ExportError(f"no ONNX file at {path}; export one first, or check the path")
    unknown = [provider for provider in providers if provider not in onnxruntime.get_available_providers()]
    if unknown:
        raise ExportError(
            f"onnxruntime has no {unknown[0]} here; available: {', '.join(onnxruntime.get_available_providers())}"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors reach the caller as exceptions, warnings concern the graph's optimisation
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exception types share no public base
        reason = str(error).strip().partition("\n")[0]
        advice = next((text for key, text in _ADVICE.items() if key in reason), "export the graph again")
        raise ExportError(f"onnxruntime cannot load {path}: {reason}; {advice}") from error


def _run(session: Any, feeds: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
    """Bind torch tensors as they are, run, and hand the outputs over as they are."""
    import onnxruntime  # noqa: PLC0415 - loaded with the session

    binding = session.io_binding()
    held = []  # the arrays must outlive the run
    for name, tensor in feeds.items():
        array = tensor.detach().cpu().contiguous().numpy()
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        held.append((array, value))
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        binding.bind_output(name, "cpu")
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime's exception types share no public base
        shapes = {name: tuple(tensor.shape) for name, tensor in list(feeds.items())[:3]}
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(f"onnxruntime failed on inputs {shapes}, ...: {reason}") from error
    return [_to_torch(value) for value in binding.get_outputs()]


def _to_torch(value: Any) -> Tensor:
    if hasattr(value, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(value)
    return torch.from_numpy(value.numpy())


def _empty(value: Any, batch: int) -> Tensor:
    sizes = [size if isinstance(size, int) else 0 for size in value.shape]
    if value.type not in _DTYPES:
        raise ExportError(f"cache input {value.name!r} has the type {value.type}, which torch cannot make")
    return torch.empty(batch, *sizes[1:], dtype=_DTYPES[value.type])


def _cache_order(name: str) -> tuple[int, str]:
    found = _CACHE_INPUT.fullmatch(name)
    assert found is not None
    return int(found[1]), found[2]
