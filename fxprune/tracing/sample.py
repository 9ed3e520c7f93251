"""The sample that a Hugging Face model is traced with: tokens, a left-padded mask, positions, a cache that grows."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from fxprune.models.cache_names import cache_argument
from fxprune.tracing.cache import BATCH, NEW, PAST, growing_cache

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["left_padded", "random_tokens", "sample_inputs"]


_IMAGE = 224
"""Height and width of images where the configuration names none: what image processors give by default."""
_WHOLE = 11
"""Tokens of a whole sequence: no multiple of a chunk, or the graph would miss how the rest of one is padded."""


def sample_inputs(model: nn.Module, length: int | None = None, *, cache: bool = True) -> dict[str, Any]:
    """Make up a small sample of a Hugging Face model's deployable form.

    Causal language models get tokens, a left-padded mask, positions and, if it grows with the tokens, a cache; encoders
    get what their signature asks for among tokens, pixels and decoder tokens.

    Args:
        model: a `PreTrainedModel`, on any device, meta included.
        length: tokens of a causal language model that gets no cache; a few when None.
        cache: whether a causal language model gets one if it can.

    Returns:
        Keyword arguments of `model.forward`.
    """
    parameters = inspect.signature(model.forward).parameters
    config: Any = model.config
    first = next(model.parameters())
    device = first.device
    # Outputs have names in the graph; a model that returns tuples by default is asked for them.
    named = {"return_dict": True} if getattr(config, "return_dict", True) is False else {}
    if "pixel_values" in parameters and "input_ids" not in parameters:
        size: Any = _of_images(config, "image_size", _IMAGE)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        # Noise: what is blank gives every patch the same numbers, and hides what differs between them.
        generator = torch.Generator().manual_seed(0)
        channels: Any = _of_images(config, "num_channels", 3)
        pixels = torch.randn(BATCH, channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(device, first.dtype), **named}
    generates: Any = getattr(model, "can_generate", lambda: False)
    if getattr(config, "is_encoder_decoder", False):
        # A classifier shifts the encoder's tokens for its decoder, and looks for their end in what that gives.
        decoder = {"decoder_input_ids": random_tokens(config, NEW, device)} if generates() else {}
        return {
            "input_ids": random_tokens(config, PAST, device),
            "attention_mask": left_padded(BATCH, PAST, device),
            **decoder,
            "use_cache": False,
            **named,
        }
    takes_cache = cache_argument(model)
    no_cache = {"use_cache": False} if takes_cache or "use_cache" in parameters else {}
    if not generates():
        mask = left_padded(BATCH, NEW, device)
        return {"input_ids": random_tokens(config, NEW, device), "attention_mask": mask, **no_cache, **named}
    filled = growing_cache(model) if cache and takes_cache else None
    past, new = (0, length or _WHOLE) if filled is None else (PAST, NEW)
    inputs = {"input_ids": random_tokens(config, new, device), "attention_mask": left_padded(BATCH, past + new, device)}
    if "position_ids" in parameters:
        inputs["position_ids"] = torch.arange(past, past + new, device=device).repeat(BATCH, 1)
    rest = no_cache if filled is None else {str(takes_cache): filled, **_asked_for_cache(parameters, config)}
    inputs = {name: tensor for name, tensor in inputs.items() if _takes(parameters, name)}
    return {**inputs, **rest, **named}


def _of_images(config: Any, name: str, otherwise: int) -> Any:
    """A field about images, of the model or of its vision part; convolutional classes name no size, and take any."""
    parts = (config, getattr(config, "vision_config", None))
    return next((found for part in parts if (found := getattr(part, name, None)) is not None), otherwise)


def _asked_for_cache(parameters: Mapping[str, inspect.Parameter], config: Any) -> dict[str, Any]:
    """A configuration may want no cache, as those that training writes do; the graph has one all the same."""
    off = getattr(config, "use_cache", True) is False and _takes(parameters, "use_cache")
    return {"use_cache": True} if off else {}


def _takes(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def random_tokens(config: Any, length: int, device: torch.device) -> Tensor:
    """Tokens of the sample, (batch, length) int64, the same each time."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", 2) or 2
    return torch.randint(0, vocabulary, (BATCH, length), generator=torch.Generator().manual_seed(0)).to(device)


def left_padded(batch: int, length: int, device: torch.device) -> Tensor:
    """A mask with one padded row: an all-ones mask can vanish from the graph."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :2] = 0
    return mask.to(device)
