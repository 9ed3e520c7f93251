"""Tiny random models for the ONNX tests, traced and exported once a process, and how they are run."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from fxprune.exporters.onnx import OnnxExport, export_onnx
from fxprune.passes.lift_linears import LiftLinears
from fxprune.runtimes.runners import Past, Runner, position_ids_from_mask
from fxprune.tracing.trace import trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxprune.core.program import Program

VOCABULARY = 61


def randomize(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data.copy_(noise if parameter.dim() > 1 else parameter.data + noise)
    return model.eval()


def llama(**options: Any) -> Any:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    }
    return randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | options))))


def llama_with_mixed_heads() -> nn.Module:
    """The second layer has six query heads over three key/value heads, the first four over two."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    model = llama(head_dim=8)
    config = copy.deepcopy(model.config)
    config.num_attention_heads, config.num_key_value_heads = 6, 3
    model.model.layers[1].self_attn = LlamaAttention(config, 1)
    return randomize(model)


def qwen3() -> nn.Module:
    config = transformers.Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    return randomize(transformers.Qwen3ForCausalLM(config))


def gptj() -> nn.Module:
    """Attention without a fused operator, interleaved rotary embeddings, LayerNorm, biases."""
    config = transformers.GPTJConfig(
        n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, vocab_size=VOCABULARY
    )
    return randomize(transformers.GPTJForCausalLM(config))


def falcon() -> nn.Module:
    """Writes in place, multi-query attention, parallel residual."""
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    return randomize(transformers.FalconForCausalLM(config))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    return randomize(transformers.BertModel(config, add_pooling_layer=False))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama_with_mixed_heads": llama_with_mixed_heads,
    "qwen3": qwen3,
    "gptj": gptj,
    "falcon": falcon,
}


def lifted(model: nn.Module, **options: Any) -> Program:
    return LiftLinears()(trace(model, **options)).program


@functools.cache
def program_of(name: str) -> Program:
    return lifted(MODELS[name]())


_FILES = tempfile.TemporaryDirectory(prefix="fxprune-onnx-")


@functools.cache
def exported(name: str, fusions: Any = "auto") -> tuple[Program, OnnxExport]:
    """Program and export by model name and fusions, made once for the whole run."""
    program = program_of(name)
    return program, export_onnx(program, Path(_FILES.name) / f"{name}-{fusions}", fusions=fusions)


def tokens(batch: int, length: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and a mask whose first row is padded on the left."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def run_in_steps(runner: Runner, ids: Tensor, mask: Tensor, stops: list[int]) -> tuple[Tensor, Past]:
    past: Past | None = None
    logits, start = [], 0
    for stop in stops:
        seen = mask[:, :stop]
        step, past = runner.step(ids[:, start:stop], seen, position_ids_from_mask(seen, stop - start), past)
        logits.append(step)
        start = stop
    assert past is not None
    return torch.cat(logits, dim=1), past
