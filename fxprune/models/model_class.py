"""Which class the model of a configuration has, and what models of a class can do with text.

One rule for every command: the class is the one that `architectures[0]` names, if transformers maps the configuration
to it; a configuration that names none has the first of `AUTO_CLASSES` that knows it. What a class can do follows from
what it says about itself.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from fxprune.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["AUTO_CLASSES", "class_of_config", "config_of_class", "is_language_model", "reads_tokens", "text_inputs"]

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)
"""Where the class of a configuration without `architectures` is looked for, first to last."""


def class_of_config(config: PreTrainedConfig, where: str = "config.json") -> type[PreTrainedModel]:
    """The class of a configuration's model.

    Args:
        config: the configuration.
        where: what messages call it.

    Raises:
        CheckpointError: transformers maps the configuration to no class of the name that it gives, or, without a name,
            to no class of `AUTO_CLASSES`.
    """
    import transformers  # noqa: PLC0415 - heavy

    from fxprune.models.skeleton import resolve_model_class  # noqa: PLC0415 - imports transformers' models

    named = (getattr(config, "architectures", None) or [None])[0]
    if isinstance(named, str):
        try:
            return resolve_model_class(config, named)
        except CheckpointError as error:
            raise CheckpointError(f"{where} names the class {named}: {error}") from error
    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            model_class: type[PreTrainedModel] = found[0] if isinstance(found, (tuple, list)) else found
            return model_class
    raise CheckpointError(
        f"{where} names no class in `architectures`, and transformers has no model for {type(config).__name__} that "
        "fxprune can trace: name one there"
    )


def config_of_class(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that a class is built from: its text part for the class of a text part."""
    part = (config.sub_configs or {}).get("text_config")
    if part is not None and getattr(model_class, "config_class", None) is part:
        return config.get_text_config()
    return config


def reads_tokens(model_class: type[Any]) -> bool:
    """Whether a model's main input is tokens, so that text can be run through it."""
    return getattr(model_class, "main_input_name", "input_ids") == "input_ids"


def is_language_model(model_class: type[Any], config: Any) -> bool:
    """Whether models of a class predict the next token of the text they read: they have a loss on it, and write text.

    Encoder-decoders predict the next token of another text than the one they read.
    """
    generates: Any = getattr(model_class, "can_generate", None)
    return (
        reads_tokens(model_class)
        and callable(generates)
        and bool(generates())
        and not getattr(config, "is_encoder_decoder", False)
    )


def text_inputs(model: Any, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
    """Arguments of a forward pass over text that asks for no cache; an encoder-decoder reads it on both sides.

    Args:
        model: a model that reads tokens.
        input_ids: (batch, length) int64.
        attention_mask: (batch, length) int64, 0 for padding.
    """
    parameters = inspect.signature(model.forward).parameters
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = input_ids
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {name: value for name, value in given.items() if anything or name in parameters}
    return given | ({"use_cache": False} if "use_cache" in parameters else {})
