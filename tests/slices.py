"""Tiny random models of any class, their state dicts cut by hand, and the masked dense models these must agree with."""

from __future__ import annotations

import copy
import inspect
import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from fxprune.checkpoints.checkpoint import ExpectedLogits, save
from fxprune.core.program import Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from fxprune.checkpoints.checkpoint import CheckpointInfo

__all__ = [
    "EPSILON",
    "HIDDEN",
    "SMALL",
    "Cut",
    "Keep",
    "consumer_cuts_of",
    "cut",
    "cuts_of",
    "expected_of",
    "hidden_state",
    "inputs_of",
    "json_of",
    "logits",
    "make_model",
    "masked",
    "masked_hidden",
    "save_slim",
    "source_of",
    "without_experts",
    "without_layers",
]

HIDDEN = 40
"""No other axis of the tiny models is as long."""
EPSILON = 0.01
"""Large, so that a wrong epsilon shows in the logits."""

_SIZES: dict[str, object] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "rms_norm_eps": EPSILON,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "head_dim": None, "eos_token_id": None}
"""Three layers, and heads whose size the class derives from the hidden size: 8, as by default."""

_OWN_SIZES: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 3},
    "opt": {"ffn_dim": 24, "intermediate_size": None},
    "gpt2": {"n_positions": 64, "n_inner": 24, "head_dim": None},
    "falcon": {"head_dim": None, "ffn_hidden_size": 24},
    "mpt": {"d_model": HIDDEN, "n_heads": 4, "n_layers": 4, "head_dim": None},
    "gpt_bigcode": {"n_positions": 64, "n_inner": 24, "head_dim": None},
    "t5": {
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_heads": 4,
        "layer_norm_epsilon": EPSILON,
        "decoder_start_token_id": 0,
    },
}

Cut = tuple[str, int, "Sequence[int]"]
"""Pattern that a parameter's whole name matches, axis, and what stays along it."""


def make_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A model of four layers and random weights: what is zero or one by default hides mistakes.

    Args:
        model_type: as in `config.json`.
        changes: configuration fields; None leaves a field to the class.
    """
    torch.manual_seed(0)
    values = {**_SIZES, **_OWN_SIZES.get(model_type, {}), **changes}
    if model_type == "t5":
        values = {key: value for key, value in values.items() if key in _OWN_SIZES["t5"] or key.endswith("_id")}
        values |= {"vocab_size": 61, **changes}
    named = {key: value for key, value in values.items() if value is not None or key.endswith("_id")}
    config = CONFIG_MAPPING[model_type](**named)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            matrix = parameter.dim() > 1
            parameter.copy_(torch.randn_like(parameter) * (0.2 if matrix else 0.1) + (0.0 if matrix else 1.0))
    return model


def source_of(model: PreTrainedModel, **changes: Any) -> Source:
    """Where a model comes from, as the compiler would say it."""
    generation = model.generation_config if model.can_generate() else None
    source = Source("tiny", copy.deepcopy(model.config), type(model), generation_config=generation)
    return replace(source, **changes)


def save_slim(tensors: dict[str, Tensor], model: PreTrainedModel, directory: Path, **options: Any) -> CheckpointInfo:
    """Save without a plan and a history."""
    return save(tensors, directory, source=source_of(model), plan={}, history=[], **options)


def json_of(directory: Path, name: str = "fxprune.json") -> dict[str, Any]:
    """Content of a JSON file of a checkpoint."""
    values: dict[str, Any] = json.loads((directory / name).read_text())
    return values


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of two rows, the second left-padded."""
    ids = torch.tensor([[3, 14, 15, 9, 26, 5], [0, 0, 35, 8, 9, 7]])
    mask = (ids != 0).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids.flip(0)[:, 2:]}
    elif "position_ids" in inspect.signature(model.forward).parameters:
        inputs |= {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return inputs


def logits(model: PreTrainedModel) -> Tensor:
    """Logits of that batch; padding is cut off."""
    inputs = inputs_of(model)
    with torch.no_grad():
        output: Tensor = model(**inputs, use_cache=False).logits
    return output.flatten(0, 1) if model.config.is_encoder_decoder else output[inputs["attention_mask"].bool()]


def expected_of(model: PreTrainedModel, dtype: torch.dtype | None = None) -> ExpectedLogits:
    """What a model gives for that batch."""
    inputs = inputs_of(model)
    with torch.no_grad():
        return ExpectedLogits(inputs, model(**inputs, use_cache=False).logits, dtype)


def cut(state: dict[str, Tensor], cuts: Iterable[Cut]) -> dict[str, Tensor]:
    """A copy of a state dict with axes of matching parameters narrowed; a cut that matches nothing is a mistake."""
    slim = {name: tensor.clone() for name, tensor in state.items()}
    for pattern, axis, kept in cuts:
        names = [name for name in slim if re.fullmatch(pattern, name)]
        assert names, pattern
        for name in names:
            slim[name] = slim[name].index_select(axis, torch.tensor(list(kept)))
    return slim


def masked(model: PreTrainedModel, cuts: Iterable[Cut]) -> PreTrainedModel:
    """A copy of the dense model with everything along the axes zeroed that does not stay."""
    reference = copy.deepcopy(model)
    for pattern, axis, kept in cuts:
        for name, parameter in reference.named_parameters():
            if re.fullmatch(pattern, name):
                _zero(parameter, axis, kept)
    return reference


@dataclass(frozen=True)
class Keep:
    """What one layer keeps: query heads, KV heads, MLP channels; None for all."""

    heads: Sequence[int] | None = None
    kv: Sequence[int] | None = None
    mlp: Sequence[int] | None = None


def cuts_of(model: PreTrainedModel, keeps: Sequence[Keep]) -> list[Cut]:
    """The cuts that leave each layer what it keeps."""
    return [piece for layer, keep in enumerate(keeps) for piece in (*_mlp(model, layer, keep), *_heads(layer, keep))]


def consumer_cuts_of(model: PreTrainedModel, keeps: Sequence[Keep]) -> list[Cut]:
    """Those of them along the inputs of the projections that read the heads and channels: they make the mask."""
    cuts: list[Cut] = []
    for layer, keep in enumerate(keeps):
        cuts += _mlp(model, layer, keep)[-1:]
        cuts += [piece for piece in _heads(layer, keep) if piece[0].endswith(_OUTPUT)]
    return cuts


_OUTPUT = r"(o|out)_proj\.weight"


def _heads(layer: int, keep: Keep) -> list[Cut]:
    def rows(heads: Sequence[int]) -> list[int]:
        return [8 * head + channel for head in heads for channel in range(8)]

    attention = rf"model\.(decoder\.)?layers\.{layer}\.self_attn\."
    cuts: list[Cut] = []
    if keep.heads is not None:
        cuts += [(rf"{attention}q_proj\.(weight|bias)", 0, rows(keep.heads))]
        cuts += [(f"{attention}{_OUTPUT}", 1, rows(keep.heads))]
    if keep.kv is not None:
        cuts += [(rf"{attention}[kv]_proj\.(weight|bias)", 0, rows(keep.kv))]
    return cuts


def _mlp(model: PreTrainedModel, layer: int, keep: Keep) -> list[Cut]:
    """Cuts of the projections that write the MLP's channels, then of the one that reads them."""
    if keep.mlp is None:
        return []
    writes = rf".*\.{layer}\.(mlp\.(gate_proj|up_proj|c_fc|dense_h_to_4h)|fc1)"
    reads = rf".*\.{layer}\.(mlp\.(down_proj|c_proj|dense_4h_to_h)|fc2)"
    axis = 1 if any(isinstance(module, Conv1D) for module in model.modules()) else 0  # Conv1D has (in, out)
    biases = [name for name in model.state_dict() if re.fullmatch(rf"{writes}\.bias", name)]
    return [
        (rf"{writes}\.weight", axis, keep.mlp),
        *[(re.escape(name), 0, keep.mlp) for name in biases],
        (rf"{reads}\.weight", 1 - axis, keep.mlp),
    ]


def _zero(parameter: Tensor, axis: int, kept: Sequence[int]) -> None:
    dropped = sorted(set(range(parameter.shape[axis])) - set(kept))
    parameter.data.index_fill_(axis, torch.tensor(dropped, dtype=torch.long), 0.0)


def hidden_state(
    model: PreTrainedModel, kept: Sequence[int], spared: Mapping[str, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The state dict with a narrower hidden dimension and the norms folded, and the epsilons that these need.

    With x zero outside the kept channels, mean(x^2) over all is d_new / d_old times the mean over the kept ones:
    x / sqrt(mean + eps) = sqrt(d_old / d_new) * x / sqrt(mean_kept + eps * d_old / d_new).

    Args:
        model: the dense model.
        kept: hidden channels.
        spared: axes, by pattern of the parameter's name, that are as long as the hidden one and something else.
    """
    index, widths = torch.tensor(list(kept)), HIDDEN / len(kept)
    slim: dict[str, Tensor] = {}
    epsilons: dict[str, float] = {}
    for name, tensor in model.state_dict().items():
        slim[name] = tensor.clone()
        for axis in _hidden_axes(name, tensor, spared):
            slim[name] = slim[name].index_select(axis, index)
        if _is_hidden_norm(name, tensor):
            module = model.get_submodule(name.removesuffix(".weight"))
            offset = 1.0 if "Gemma" in type(module).__name__ else 0.0  # Gemma multiplies with 1 + weight
            slim[name] = (slim[name] + offset) * widths**0.5 - offset
            epsilons[name.removesuffix(".weight")] = EPSILON * widths
    return slim, epsilons


def masked_hidden(
    model: PreTrainedModel, kept: Sequence[int], spared: Mapping[str, int] | None = None
) -> PreTrainedModel:
    """A copy of the dense model that writes nothing to the removed hidden channels."""
    reference = copy.deepcopy(model)
    for name, parameter in reference.named_parameters():
        for axis in () if _is_hidden_norm(name, parameter) else _hidden_axes(name, parameter, spared):
            _zero(parameter, axis, kept)
    return reference


def _hidden_axes(name: str, tensor: Tensor, spared: Mapping[str, int] | None) -> list[int]:
    other = {axis for pattern, axis in (spared or {}).items() if re.fullmatch(pattern, name)}
    return [axis for axis, size in enumerate(tensor.shape) if size == HIDDEN and axis not in other]


def _is_hidden_norm(name: str, tensor: Tensor) -> bool:
    return tensor.shape == (HIDDEN,) and "norm" in name and name.endswith(".weight")


def without_layers(model: PreTrainedModel, kept: dict[str, Sequence[int]]) -> tuple[dict[str, Tensor], PreTrainedModel]:
    """The state dict without the layers that are not kept, and a dense model that skips them."""
    reference = copy.deepcopy(model)
    state = model.state_dict()
    for name, indices in kept.items():
        for index, layer in enumerate(reference.get_submodule(name).children()):
            if index in indices:
                continue
            layer.register_forward_hook(_skip, with_kwargs=True)
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.{index}.")}
    return state, reference


def _skip(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def without_experts(model: PreTrainedModel, router: str, kept: Sequence[int]) -> PreTrainedModel:
    """A copy of the dense model whose router, or routers, never choose the experts that are not kept.

    The weights of the chosen experts must be the softmax over these, which a normalised softmax over all is too.
    """
    reference = copy.deepcopy(model)

    def choose(module: nn.Module, _args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> Any:
        hidden = torch.full_like(output[0], -torch.inf)
        hidden[..., list(kept)] = output[0][..., list(kept)]
        values, indices = hidden.topk(module.top_k, dim=-1)  # type: ignore[arg-type]
        return hidden, values.softmax(-1), indices

    matching = [module for name, module in reference.named_modules() if re.fullmatch(router, name)]
    assert matching, router
    for module in matching:
        module.register_forward_hook(choose)
    return reference
