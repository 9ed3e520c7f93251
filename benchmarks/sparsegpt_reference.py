"""The engine against a plain SparseGPT loop, same calibration, same machine, runs interleaved.

    python -m benchmarks.sparsegpt_reference --data DIR [--runs 2] [--out JSON]

The loop is the published procedure (Frantar & Alistarh 2023, algorithm 1 and section 4) written plainly: for each
block, one forward pass of all samples that collects a Hessian for each of its Linears, in float32; each Linear solved
with its own Cholesky factors; a second forward pass with the new weights. Both sides prune 50% of all block Linears.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import make_parser, write_results
from fxprune.calibration.text import CalibrationSpec, calibration_set
from fxprune.checkpoints.load_model import load_model
from fxprune.core.pipeline import build_pass
from fxprune.evaluation.perplexity import file_perplexity
from fxprune.measure.speed import machine
from fxprune.models.default_model import default_model_path
from fxprune.runtimes.matmul import fast_products
from fxprune.runtimes.runners import EagerRunner
from fxprune.tracing.lifted_graphs import state_tensors
from fxprune.tracing.trace import trace

BLOCK = 128


class Hessian:
    """2/n XᵀX of one Linear, updated batch by batch as the paper's code does."""

    def __init__(self, linear: nn.Linear) -> None:
        self.matrix = torch.zeros(linear.in_features, linear.in_features)
        self.samples = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """The forward hook."""
        del module, output
        x = args[0].reshape(-1, args[0].shape[-1]).t().float()
        count = args[0].shape[0]
        self.matrix *= self.samples / (self.samples + count)
        self.samples += count
        x = (2 / self.samples) ** 0.5 * x
        self.matrix += x.matmul(x.t())


def sparsegpt(weight: Tensor, hessian: Tensor, share: float, damping: float = 0.01) -> Tensor:
    """Algorithm 1, column by column."""
    weight = weight.clone().float()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        block = weight[:, start:end].clone()
        pruned, errors = torch.zeros_like(block), torch.zeros_like(block)
        inner = factor[start:end, start:end]
        scores = block**2 / inner.diagonal().reshape(1, -1) ** 2
        threshold = scores.flatten().sort()[0][int(scores.numel() * share)]
        mask = scores <= threshold
        for i in range(end - start):
            column, diagonal = block[:, i], inner[i, i]
            kept = column.clone()
            kept[mask[:, i]] = 0
            pruned[:, i] = kept
            error = (column - kept) / diagonal
            block[:, i:] -= error.unsqueeze(1).matmul(inner[i, i:].unsqueeze(0))
            errors[:, i] = error
        weight[:, start:end] = pruned
        weight[:, end:] -= errors.matmul(factor[start:end, end:])
    return weight


def plain_loop(model: Any, tokens: Tensor, share: float) -> None:
    """Prune a decoder in place, block by block, two forward passes a block."""
    captured: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class _Stop(Exception):  # noqa: N818 - not an error
        pass

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append((args, kwargs))
        raise _Stop

    layers = model.model.layers
    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in tokens:
        try:
            model(row[None], use_cache=False)
        except _Stop:
            continue
    handle.remove()
    hidden = [args[0] for args, _ in captured]
    kwargs = captured[0][1]
    for layer in layers:
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        hessians = [Hessian(linear) for linear in linears]
        handles = [linear.register_forward_hook(h) for linear, h in zip(linears, hessians, strict=True)]
        for x in hidden:
            layer(x, **kwargs)
        for one in handles:
            one.remove()
        for linear, hessian in zip(linears, hessians, strict=True):
            linear.weight.data = sparsegpt(linear.weight.data, hessian.matrix, share).to(linear.weight.dtype)
        outputs = [layer(x, **kwargs) for x in hidden]
        hidden = [out[0] if isinstance(out, tuple) else out for out in outputs]


def peaks() -> dict[str, float]:
    """GFLOP/s of square products here: float32 as torch does them, with oneDNN's kernels, and bfloat16."""
    one = torch.randn(2048, 2048)
    low = one.bfloat16()

    def rate(product: Any) -> float:
        product()
        best = min(_seconds(product) for _ in range(5))
        return 2 * 2048**3 / best / 1e9

    with fast_products():
        fast = rate(lambda: one @ one)
    return {"float32": rate(lambda: one @ one), "float32_onednn": fast, "bfloat16": rate(lambda: low @ low)}


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def flops(model: Any, tokens: int) -> dict[str, float]:
    """TFLOP of one forward pass through the blocks' Linears, and of the Gram matrices of distinct inputs, by halves."""
    linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    forward = sum(2 * m.weight.numel() for m in linears) * tokens
    layer = model.model.layers[0]
    widths = {"attention": layer.self_attn.q_proj, "output": layer.self_attn.o_proj}
    widths |= {"mlp": layer.mlp.gate_proj, "down": layer.mlp.down_proj}
    gram = sum(m.in_features**2 for m in widths.values()) * tokens * len(model.model.layers)
    reference = sum(2 * m.in_features**2 for m in linears) * tokens
    return {"forward": forward / 1e12, "gram": gram / 1e12, "gram_reference": reference / 1e12}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = make_parser(__doc__, "sparsegpt_reference", samples=128)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="directory of a llama-like model; the embedded default by default")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--windows", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    loaded = load_model(arguments.model or str(default_model_path()))
    calibration = str(arguments.data / "calibration" / "sample_c4-rp1.jsonl")
    spec = CalibrationSpec(calibration, samples=arguments.samples, seq_len=512)
    tokens = calibration_set(spec, tokenizer=loaded.tokenizer, config=loaded.config).tokens
    program = build_pass("lift_linears", {})(trace(loaded.model, tokenizer=loaded.tokenizer)).program
    result: dict[str, Any] = {"reference": [], "engine": [], "parts": [], "peaks_gflops": []}
    text = arguments.data / "wikitext-2-raw" / "wiki.test.raw"

    def perplexity(model: Any) -> float:
        runner = EagerRunner(model.to(torch.bfloat16), "bfloat16")
        return file_perplexity(runner, text, loaded.tokenizer, max_windows=arguments.windows, batch_size=4).perplexity

    for index in range(arguments.runs):
        result["peaks_gflops"].append(peaks())
        model = copy.deepcopy(loaded.model)
        result["reference"].append(_seconds(lambda model=model: plain_loop(model, tokens, 0.5)))
        if index == 0:
            result["reference_perplexity"] = perplexity(model)
        method = build_pass("sparsegpt", {"calibration": calibration, "samples": arguments.samples, "seq_len": 512})
        start = time.perf_counter()
        pruned = method(program).program
        result["engine"].append(time.perf_counter() - start)
        result["parts"].append(pruned.results["sparsity"]["seconds"])
        if index == 0:
            model = copy.deepcopy(loaded.model)
            model.load_state_dict(state_tensors(pruned.graph_module), strict=False)
            result["engine_perplexity"] = perplexity(model)
        print({key: value[-1] for key, value in result.items() if isinstance(value, list)}, flush=True)
    result |= {
        "speedup": fmean(result["reference"]) / fmean(result["engine"]),
        "spread": {k: stdev(result[k]) if arguments.runs > 1 else 0.0 for k in ("reference", "engine")},
        "tflop": flops(loaded.model, tokens.numel()),
        "threads": arguments.threads,
        "machine": machine(),
    }
    write_results(arguments.out, result)


if __name__ == "__main__":
    main()
