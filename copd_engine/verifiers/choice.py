r"""Multiple choice: which of the options A to J a response settles on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from copd_engine.types import Example, UserError
from copd_engine.verifiers.extract import Answer, ascii_signs, find_answer, first_sentence
from copd_engine.verifiers.text import normalize

LETTERS = "ABCDEFGHIJ"

_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit|boxed)\s*\{([^{}]*)\}")
#: A star between letters or digits multiplies.
_QUOTES = re.compile(r"[`\"'$]|(?<![^\W_])\*|\*(?![^\W_])|\\[()\[\] ]|\\(?:left|right)(?![A-Za-z])")
#: "option (B)", "choice B": the word says no more than the letter.
_NOUN = re.compile(
    r"^(?i:(?:the\s+)?(?:correct\s+)?(?:options?|choices?|letters?|answers?)\s*:?\s+)(?=[(\[]?[A-Ja-j]\b)"
)
_ONE = re.compile(r"[(\[{]?\s*([A-Ja-j])\s*[)\]}]?\s*[.:]?")
_MARK = r"[(\[]?[A-J][)\]]?[.:]?"
_SEVERAL = re.compile(rf"[\[{{(]?\s*{_MARK}(?:\s*(?:,\s*(?:and\s+)?|;|/|&|\+|\band\b)\s*{_MARK})+\s*[\]}})]?")
_RUN = re.compile(r"[(\[{]?([A-J]{2,10})[)\]}]?[.:]?")
#: A letter with its mark and then text: "B) Paris", "(B) Paris", "B. Paris", "B, because".
_LABELLED = re.compile(r"(?:[(\[]([A-J])[)\]][.:]?|([A-J])\s*[).:,]|([A-J])\s*-(?=\s))\s*(?P<text>\S.*)", re.DOTALL)
#: A bare letter before a word: "A dog" has an article, "I think" a pronoun. These words cannot follow either.
_FOLLOWED = re.compile(r"([A-J])\s+(?:because|since|as|is|for|which|where|due)\b.*", re.DOTALL)
_REASON = re.compile(r"[,;(]?\s*\b(?:because|since|as|due)\b.*", re.DOTALL)
#: A second option beside the first one: "B) 5 or C) 6".
_ANOTHER = re.compile(
    r"(?:\bor\b|\band\b|/|,|;)\s*[(\[]?[A-J](?:[)\].:]|\b(?!\s+[a-z]))|[(\[][A-J][)\]]|(?<![\w(])[A-J]\)"
)
_CHOSEN = re.compile(
    r"(?:options?|choices?|choose|pick|select|chose|go with)\b[^A-Za-z\n]{0,6}(?:(?:is|are|would be|must be)\b)?"
    r"[^A-Za-z\n]{0,6}\(?([A-J])\b(?!\s+[a-z])|\(([A-J])\)|\*\*\(?([A-J])\)?[.:]?\*\*"
    r"|\b([A-J])\)?\s+(?:is|must be)\s+(?:the\s+)?(?:correct|right|best)\b"
    r"|(?<![A-Za-z])(?:is|are):?\s+([A-J])\s*[.!]?\s*$"
)


def multiple_choice(response: str, example: Example) -> float:
    """1 when the letters that the response settles on are those of the gold.

    Gold: a letter ("B", "(B)"), several ("AC", "A, C"), which must all be named, or an option's text where
    ``metadata.choices`` gives the options (a list in the order of the letters, or a mapping of letter to text). With
    ``choices`` an option's text is an answer too, unless it is a lone letter, which is always a label, or two options'
    texts differ in nothing that counts. A response that names a letter beside another option's text, whichever letter
    that is, or letters joined by "or", settles on none.
    """
    gold, options = _gold(example)
    return float(_settled(find_answer(response), options) == gold)


def chosen_letters(response: str, example: Example) -> str | None:
    """The letters that the response settles on, in order ("AC"); None where it settles on none."""
    letters = _settled(find_answer(response), _gold(example)[1])
    return "".join(sorted(letters)) if letters else None


def check_choice(example: Example) -> None:
    """Raises UserError for a gold without letters, letters beyond the choices, or choices that are no texts."""
    _gold(example)


def _settled(answer: Answer, options: Mapping[str, str]) -> frozenset[str] | None:
    """Letters of the answer; None or no letters where it is none or ambiguous."""
    letters = _letters(answer.text, options)
    if letters is None and answer.source != "tag":
        letters = _letters(first_sentence(answer.text), options)
    if letters is not None or answer.source != "whole":
        return letters
    # No answer is marked: the last line may be one, or name a single option in passing ("so I choose (B)").
    last_line = answer.text.rstrip().rpartition("\n")[2].strip()
    letters = _letters(last_line, options)
    if letters is not None:
        return letters
    named = {letter for match in _CHOSEN.finditer(last_line) for letter in match.groups() if letter}
    return frozenset(named) if len(named) == 1 else None


def _letters(text: str, options: Mapping[str, str]) -> frozenset[str] | None:
    """None for what is not understood, no letters for a label beside another option's text."""
    text = _NOUN.sub("", _bare(text[:2_000])).strip()
    if match := _ONE.fullmatch(text):
        return frozenset(match[1].upper())
    labelled = _LABELLED.fullmatch(text)
    # The label before the text: an article or an option's text may look like one, and equal texts have other labels.
    if labelled and (stated := _of_text(labelled["text"], options)):
        return stated & {_label(labelled)}
    if letter := _only(text, options):
        return frozenset(letter)
    if _SEVERAL.fullmatch(text):
        return _without_repeats("".join(re.findall(r"[A-J](?![A-Za-z])", text)))
    if match := _RUN.fullmatch(text):
        return _without_repeats(match[1])
    if match := _FOLLOWED.fullmatch(text):
        return None if _ANOTHER.search(_REASON.sub("", text)) else frozenset(match[1])
    if labelled and not _ANOTHER.search(f", {_REASON.sub('', labelled['text'])}"):
        return frozenset(_label(labelled))
    return None


def _bare(text: str) -> str:
    return _QUOTES.sub("", _MARKUP.sub(r"\1", ascii_signs(text))).strip()


def _label(labelled: re.Match[str]) -> str:
    return next(letter for letter in labelled.groups()[:3] if letter)


def _of_text(text: str, options: Mapping[str, str]) -> frozenset[str]:
    """Letters of the options that are ``text``, up to what :func:`normalize` takes away."""
    key = normalize(text)
    return frozenset(letter for letter, option in options.items() if normalize(_bare(option)) == key)


def _only(text: str, options: Mapping[str, str]) -> str | None:
    """Letter of the one option that is ``text``, letter by letter or else normalised; None where several are."""
    same = [letter for letter, option in options.items() if _bare(option) == text] or sorted(_of_text(text, options))
    return same[0] if len(same) == 1 else None


def _without_repeats(letters: str) -> frozenset[str] | None:
    return frozenset(letters) if len(set(letters)) == len(letters) else None


def _gold(example: Example) -> tuple[frozenset[str], dict[str, str]]:
    where = f"{example.name}: verifier 'multiple_choice'"
    options = _options(example.metadata.get("choices"), where)
    letters = _letters(example.answer, options)
    if not letters:
        hint = " or the text of one of metadata.choices" if options else ""
        raise UserError(f"{where}: answer = {example.answer!r}: must be letters from A to J, such as B or AC{hint}")
    if options and not letters <= options.keys():
        raise UserError(f"{where}: answer = {example.answer!r}: metadata.choices has only {', '.join(options)}")
    return letters, options


def _options(choices: object, where: str) -> dict[str, str]:
    """Letter to text."""
    if choices is None:
        return {}
    if isinstance(choices, Mapping):
        options = {str(letter).strip().upper(): text for letter, text in choices.items()}
    elif isinstance(choices, Sequence) and not isinstance(choices, str | bytes):
        options = dict(zip(LETTERS, choices, strict=False)) if 0 < len(choices) <= len(LETTERS) else {}
    else:
        options = {}
    letters_known = bool(options) and all(len(letter) == 1 and letter in LETTERS for letter in options)
    if not letters_known or not all(isinstance(text, str) and text.strip() for text in options.values()):
        raise UserError(
            f"{where}: metadata.choices = {str(choices)[:80]!r}: must be a list of at most {len(LETTERS)} texts, "
            "or map letters from A to J to texts"
        )
    # "B) Paris" in the list: the label is no part of the option.
    return {letter: re.sub(rf"^\s*[(\[]?{letter}[)\].:]\s*(?=\S)", "", text) for letter, text in options.items()}
