"""Records of a data set as calibration documents: which field is text, and chats as the model's own template has them.

    {"text": ...}, or the field that was named            ─ as it stands
    {"messages": [{"role": ..., "content": ...}, ...]}     ┐
    {"conversations": [{"from": ..., "value": ...}, ...]}  ├─ the tokenizer's chat template ─ text with special tokens
    {"prompt": ..., "completion": ...} and the like        ┘

The first record decides for all. What is not clear is refused with the fields named, and nothing is guessed: text in
the wrong form, or a column of ids, prunes as readily as the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from jinja2 import TemplateError

from fxprune.core.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedTokenizerBase

__all__ = ["Chat", "RecordForm", "documents_of", "record_form", "require_template"]

Chat: TypeAlias = list[dict[str, Any]]
"""Messages with `role` and `content`, for a chat template."""

_CHATS = ("messages", "conversations")
_PAIRS = (
    ("prompt", "completion", None),
    ("prompt", "response", None),
    ("instruction", "output", "input"),
    ("instruction", "response", "context"),
)
"""What is asked, what is answered, and a text to the question that may be absent: names of TRL, Alpaca and Dolly."""
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Speakers of ShareGPT's turns, and the roles that chat templates call them by."""
_NAMED = "name the field with --text-field (text_field in Python and YAML)"
_SHOWN = 12
"""Fields that a message names at most."""


@dataclass(frozen=True)
class RecordForm:
    """Where in a record the text is.

    Attributes:
        kind: `text`; `chat`, a list of messages; or `pair`, a question and its answer.
        fields: that are read. Of a pair: question, answer and, where such records have one, the text to the question.
    """

    kind: Literal["text", "chat", "pair"]
    fields: tuple[str, ...]

    @property
    def is_chat(self) -> bool:
        """Whether the chat template writes it."""
        return self.kind != "text"

    def read(self, record: object, where: str) -> str | Chat | None:
        """The text or the messages of a record; None where nothing is said in it.

        Args:
            record: as read from JSON or a data set.
            where: which one, for messages.

        Raises:
            CalibrationError: a field is missing or holds something else than the first record's.
        """
        record = _fields_of(record, where)
        if self.kind == "text":
            text = record.get(self.fields[0])
            if not isinstance(text, str):
                raise CalibrationError(f"{where}: no text in field {self.fields[0]!r}: {_what(record, self.fields[0])}")
            return text if text.strip() else None
        if self.kind == "chat":
            chat = _messages(record.get(self.fields[0]), f"{where}, field {self.fields[0]!r}")
        else:
            chat = _pair(record, self.fields, where)
        answered = self.kind == "chat" or _says(chat[-1])
        return chat if answered and any(_says(message) for message in chat) else None


def record_form(record: object, where: str, text_field: str | None = None) -> RecordForm:
    """Which fields of records like this one are read.

    Args:
        record: the first one.
        where: which one that is, for messages.
        text_field: the field that was named; it holds a text or a list of messages.

    Raises:
        CalibrationError: the record has no such field, or which one is text is not clear.
    """
    fields = _fields_of(record, where)
    if text_field is not None:
        if text_field not in fields:
            raise CalibrationError(f"{where}: there is no field {text_field!r}; the record has {_listed(fields)}")
        return RecordForm("chat" if _is_list(fields[text_field]) else "text", (text_field,))
    if fields.get("text") is not None:
        return RecordForm("text", ("text",))
    found = [RecordForm("chat", (name,)) for name in _CHATS if fields.get(name) is not None]
    for question, answer, context in _PAIRS:
        if fields.get(question) is not None and fields.get(answer) is not None:
            more = (context,) if context is not None and context in fields else ()
            found.append(RecordForm("pair", (question, answer, *more)))
    if len(found) != 1:
        several = " or ".join("/".join(form.fields) for form in found)
        why = f"it may be {several}" if found else "none is text, messages, conversations or prompt with completion"
        raise CalibrationError(f"{where}: which of the fields {_listed(fields)} to read is not clear: {why}; {_NAMED}")
    return found[0]


def require_template(form: RecordForm, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """The tokenizer can write chats, if the records are chats.

    Raises:
        CalibrationError: it has no chat template.
    """
    if form.is_chat and not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{source} has chats (field {', '.join(form.fields)}), and the model's tokenizer has no chat template to "
            "write them with: give plain text, or name a field that holds some with --text-field (text_field in Python "
            "and YAML)"
        )


def documents_of(contents: Iterable[tuple[str, str | Chat]], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The documents, as text with special tokens of its own; chats are written when their turn comes.

    Args:
        contents: where each is from, and what it holds.
        tokenizer: whose template writes chats.

    Raises:
        CalibrationError: the template refuses a chat.
    """
    for where, content in contents:
        yield content if isinstance(content, str) else _written(content, tokenizer, where)


def _written(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """A chat as the template has it.

    Templates of models that see pictures may read contents as lists of parts alone, and would leave texts out without a
    word. Where the first thing that is said does not come out, it is asked for in this form.
    """
    text = _rendered(chat, tokenizer, where)
    said = next(message["content"].strip() for message in chat if _says(message))
    if said not in text:
        parts = [
            {**message, "content": [{"type": "text", "text": message["content"]}]} if _says(message) else message
            for message in chat
        ]
        try:
            other = _rendered(parts, tokenizer, where)
        except CalibrationError:
            return text
        return other if said in other else text
    return text


def _rendered(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise CalibrationError(
            f"{where}: the model's chat template refuses it: {error}; change or leave out such records, or {_NAMED}"
        ) from error
    assert isinstance(text, str)
    return text


def _messages(value: Any, where: str) -> Chat:
    """Messages of a list of turns, or of a dictionary of lists as older data sets have them."""
    if isinstance(value, Mapping) and value and all(isinstance(part, list) for part in value.values()):
        if len({len(part) for part in value.values()}) != 1:
            raise CalibrationError(f"{where}: its lists {_listed(value)} are not of one length")
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise CalibrationError(f"{where}: no messages: expected a list of them, got {_kind(value)}")
    return [_message(turn, f"{where}, message {number}") for number, turn in enumerate(value, start=1)]


def _message(turn: Any, where: str) -> dict[str, Any]:
    turn = _fields_of(turn, where)
    # A data set's columns are the same for all: None stands for what a message does not have.
    present = {key: value for key, value in turn.items() if value is not None}
    if "role" in present:
        role, said = present["role"], "content"
        if not isinstance(role, str):
            raise CalibrationError(f"{where}: its role is {_kind(role)}, not a name")
    elif "from" in present:
        speaker, said = present["from"], "value"
        role = _ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise CalibrationError(f"{where}: from {speaker!r} is unknown; there are {', '.join(_ROLES)}")
    else:
        raise CalibrationError(f"{where}: it has {_listed(turn)}, neither role and content nor from and value")
    more = {key: value for key, value in present.items() if key not in {"role", "from", said}}
    if said not in present and "tool_calls" not in present:
        raise CalibrationError(f"{where}: there is no {said!r}; it has {_listed(turn)}")
    return {"role": role, "content": _text_of(present.get(said, ""), f"{where}, {said!r}"), **more}


def _text_of(content: Any, where: str) -> str:
    """A content that is a text, or a list of parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise CalibrationError(f"{where}: expected a text or a list of text parts, got {_kind(content)}")
    found = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            what = f"type {part.get('type')!r}" if isinstance(part, Mapping) else _kind(part)
            raise CalibrationError(f"{where}: a part is of {what}; calibration reads parts of type 'text' alone")
        found.append(text)
    return "".join(found)


def _pair(record: Mapping[str, Any], fields: tuple[str, ...], where: str) -> Chat:
    """What is asked and what is answered, each a text or a list of messages."""
    question, answer, *context = fields
    asked, said = (
        _messages(record.get(name), f"{where}, field {name!r}")
        if _is_list(record.get(name))
        else [{"role": role, "content": _string(record, name, where)}]
        for name, role in ((question, "user"), (answer, "assistant"))
    )
    for name in context:
        if record.get(name) is not None and (text := _string(record, name, where)).strip():
            asked[-1] = {**asked[-1], "content": f"{asked[-1]['content']}\n\n{text}"}
    return [*asked, *said]


def _string(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: no text in field {name!r}: {_what(record, name)}")
    return value


def _says(message: Mapping[str, Any]) -> bool:
    return isinstance(message["content"], str) and bool(message["content"].strip())


def _is_list(value: object) -> bool:
    return isinstance(value, list | Mapping)


def _fields_of(record: object, where: str) -> Mapping[str, Any]:
    if not isinstance(record, Mapping) or not record:
        what = "an empty one" if isinstance(record, Mapping) else _kind(record)
        raise CalibrationError(f"{where}: no text: expected an object with fields, got {what}")
    return record


def _what(record: Mapping[str, Any], name: str) -> str:
    """What a field holds instead of text, for messages."""
    return f"it holds {_kind(record[name])}" if name in record else f"the record has {_listed(record)}"


def _kind(value: object) -> str:
    return {list: "a list", dict: "an object", type(None): "nothing"}.get(type(value), type(value).__name__)


def _listed(fields: Iterable[Any]) -> str:
    names = [repr(str(name)) for name in fields]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
