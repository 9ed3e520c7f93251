"""onnxruntime-genai's tokenizer against the model's own: the tokens of texts, and the text of every token.

The runtime reads `tokenizer.json` in code of its own, which leaves parts of it out: normalisers, for one. A normaliser
to composed characters (NFC) changes only text that is written with combining marks, which most text is not: there the
difference is a warning. Any other difference would make the text another's.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fxprune.exporters.genai import GenaiRunner

__all__ = ["TokenizerComparison", "compare_tokenizers"]

_TEXTS = (
    "The compiler traces a model to a graph.",
    " Leading space,  two spaces;\ta tab\nand a line.",
    "Numbers 1, 23 and 4567; don't, it's, we'll.",
    "def f(x):\n    return x ** 2\n",
    "Größe, naïve, señor, Ελλάδα, Россия, 日本語, 😀",
    "CAPITALS, 'S, DON'T; x\r\ny\n\n\nz  \n",
    "\ufb01ne \uff11\uff12 ² ½ ™ … “quoted” \u2013 dash\u00a0space",
    "हिन्दी में पाठ, ภาษาไทย, العَرَبِيَّة, 한국어, Tiếng Việt, 中文\uff1a你好。",
)
"""Text as it is written: all of it is in composed form."""
_DECOMPOSED = (
    "cafe\u0301, nai\u0308ve, Gro\u0308\u00dfe",
    "\u212bngstro\u0308m",
    "\u1112\u1161\u11ab\u1100\u1173\u11af",
)
"""Text with combining marks, a character that stands for another, and Korean in single letters."""
_PLACE = "a"
"""What stands around a token: text is made to go on after other text, where no leading space is stripped."""


@dataclass(frozen=True)
class TokenizerComparison:
    """Where the two differ: a text in quotes, or a token, with how.

    Attributes:
        texts: composed texts that get other tokens.
        decomposed: decomposed texts that get other tokens, and the same once they are composed.
        tokens: tokens, and characters of several bytes, that become other text; not asked where texts differ.
        encoded: how many texts were compared.
        decoded: how many tokens and characters were compared.
    """

    texts: Mapping[str, str]
    decomposed: Mapping[str, str]
    tokens: Mapping[str, str]
    encoded: int
    decoded: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user of the export must know, sentence by sentence."""
        if not self.decomposed or self.texts:
            return ()
        text, how = next(iter(self.decomposed.items()))
        sentence = (
            "onnxruntime-genai leaves out the tokenizer's normalisation: text with combining marks gets other tokens "
            f"than the model's tokenizer gives ({text}: {how}), composed text the same; normalise prompts to NFC "
            "before they are tokenised"
        )
        return (sentence,)


def compare_tokenizers(runner: GenaiRunner, tokenizer: Any, texts: Sequence[str] = _TEXTS) -> TokenizerComparison:
    """Compare the tokens of texts, composed and decomposed, and the text of all tokens.

    Each token is decoded with text before and after it, all at once and piece by piece. Those that are a part of a
    character say nothing by themselves: characters of several bytes stand for them, with every byte that UTF-8 has.
    Text with a character 0 is left out: the runtime hands strings over that end there.

    Args:
        runner: the runtime.
        tokenizer: the model's own, of transformers.
        texts: composed texts to tokenise; decomposed ones are added.

    Raises:
        ExportError: the runtime does not know the tokenizer's kind.
    """
    theirs = runner.tokenizer
    wrong: dict[str, str] = {}
    decomposed: dict[str, str] = {}
    for text in (*texts, *_DECOMPOSED):
        expected = list(tokenizer(text)["input_ids"])
        given, composed = (
            [int(token) for token in theirs.encode(form)] for form in (text, unicodedata.normalize("NFC", text))
        )
        if given != expected:
            (decomposed if composed == expected else wrong)[repr(text)] = f"{given[:8]} instead of {expected[:8]}"
    tokens: dict[str, str] = {}
    compared = 0
    for name, ids, start in () if wrong else _sequences(tokenizer):
        # Both leave their own beginning out: a decoder may strip the space at the start of a text.
        expected_text = _decoded(tokenizer, ids)[len(_decoded(tokenizer, start)) :]
        if "\ufffd" in expected_text or "\0" in expected_text:
            continue
        compared += 1
        try:
            once = str(theirs.decode(ids))[len(theirs.decode(start)) :]
            pieces = _streamed(theirs, ids)[len(_streamed(theirs, start)) :]
        except Exception as error:  # noqa: BLE001 - the package raises bare RuntimeErrors and its own types
            tokens[name] = f"the runtime fails ({error})"
            continue
        if not once == pieces == expected_text:
            other = once if once != expected_text else pieces
            tokens[name] = f"{other!r} instead of {expected_text!r}"
    return TokenizerComparison(wrong, decomposed, tokens, len(texts) + len(_DECOMPOSED), compared)


def _sequences(tokenizer: Any) -> Iterator[tuple[str, list[int], list[int]]]:
    """Tokens to decode: what they are, with text around them, and the text before them."""
    place = _ids(tokenizer, _PLACE)
    special = set(tokenizer.all_special_ids)
    for token in range(len(tokenizer)):
        name = tokenizer.convert_ids_to_tokens(token)
        if name is None:
            continue
        # Special tokens are left out of what is shown, and what they stand between is never one text.
        yield f"token {token} ({name!r})", [*place, token, *([] if token in special else place)], place
    for character in _characters():
        ids = _ids(tokenizer, f"{_PLACE}{character}{_PLACE}")
        if ids[: len(place)] == place:
            yield f"character {character!r}", ids, place


def _characters() -> Iterator[str]:
    """Characters whose UTF-8 has every continuation byte, and every first byte that begins assigned characters."""
    yield from (chr(code) for code in range(0x80, 0xC0))
    yield from (chr(first << 6 | 0x21) for first in range(3, 32))
    yield from (chr(first << 12 | 0x821) for first in range(16) if first != 13)
    yield from (chr(code) for code in (0x1F600, 0x40021, 0x80021, 0xE0041, 0x10FFFD))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _streamed(theirs: Any, ids: Sequence[int]) -> str:
    """Text as it is shown while it is made."""
    stream = theirs.create_stream()
    return "".join(str(stream.decode(token)) for token in ids)
