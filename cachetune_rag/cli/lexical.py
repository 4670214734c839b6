"""Finds stored chunks by the words of a question (Okapi BM25), so that `ask` works without a vector index.

Words of any script are brought into one spelling before they are compared. The differences that readers ignore are removed: upper and lower
case, full-width and compatibility forms, composed, decomposed and missing accents, vowel signs of Arabic and Hebrew, and the digits of
different scripts. In scripts that put no spaces between words, or attach particles to them, pairs of neighbouring characters are used
as words, as in most search engines.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TypeVar

import regex

_K1, _B = 1.2, 0.75

_Key = TypeVar("_Key")

# Written without spaces between words: South East Asian scripts (Unicode's line-breaking class SA: Thai, Lao, Khmer, Burmese
# and others), Chinese, Japanese, Yi, Javanese, Balinese. Korean has spaces, but between phrases: particles stick to words.
_IDEOGRAPHS = r"\p{Han}\p{Yi}々〇"
_UNSPACED = rf"{_IDEOGRAPHS}\p{{Line_Break=SA}}\p{{Hiragana}}\p{{Katakana}}ー\p{{Bopomofo}}\p{{Hangul}}\p{{Javanese}}\p{{Balinese}}"
_RUN_OR_WORD = regex.compile(rf"([{_UNSPACED}]+)|(?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+")
_CHARACTER = regex.compile(r"\P{M}\p{M}*|\p{M}+")  # vowel and tone marks belong to the character that they stand on
_IDEOGRAPH = regex.compile(f"[{_IDEOGRAPHS}]")

# Marks that may be left out in writing: accents, Hebrew points, Arabic and Syriac vowels, the Arabic stretch; and characters
# that only shape or break lines (joiners, soft hyphens, marks of direction). In Indic scripts and Thai, marks are letters.
_OPTIONAL = regex.compile(
    r"[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff"
    r"\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
    r"\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\u08ca-\u08e1\u08e3-\u08ff"
    r"\u0711\u0730-\u074a\ufe00-\ufe0f\p{Cf}]+"
)
_DIGIT = regex.compile(r"(?V1)[\p{Nd}--[0-9]]")
# Letters that differ by habit only: Arabic yeh, kaf and teh marbuta of several keyboards, and Latin letters whose stroke or
# missing dot Unicode doesn't take apart.
_SAME = str.maketrans(
    {"ى": "ي", "ی": "ي", "ک": "ك", "ة": "ه", "ە": "ه", "ٱ": "ا", "ı": "i", "ł": "l", "đ": "d", "ø": "o"}
)
_ARTICLE = regex.compile(
    r"(?:[وفبك]?ال|لل)(?=.{3})"
)  # "the", perhaps with "and", "in", "like" or "for": written as one word


def rank(question: str, texts: Iterable[tuple[_Key, str]]) -> list[_Key]:
    """Keys of the texts that share a word with the question, best first; equal scores keep their order.

    `texts` is gone through once, and of each text only the counts of the question's words are kept.
    """
    wanted = asked(question)
    found: list[tuple[_Key, Counter[str], int]] = []
    holders: Counter[str] = Counter()
    total = length = 0
    for key, text in texts:
        every = words(text)
        total += 1
        length += len(every)
        counts = Counter(word for word in every if word in wanted)
        if counts:
            found.append((key, counts, len(every)))
            holders.update(counts.keys())
    weight = {word: math.log(1 + (total - n + 0.5) / (n + 0.5)) for word, n in holders.items()}

    def score(counts: Counter[str], size: int) -> float:
        share = _K1 * (1 - _B + _B * size * total / length)
        return sum(weight[word] * n * (_K1 + 1) / (n + share) for word, n in sorted(counts.items()))

    ranked = sorted(
        ((score(counts, size), -i, key) for i, (key, counts, size) in enumerate(found)), key=lambda r: r[:2]
    )
    return [key for *_, key in reversed(ranked)]


def words(text: str) -> list[str]:
    """The words of a text, for the search. In scripts without spaces, these are single characters and pairs of them."""
    found: list[str] = []
    for run, word in _pieces(text):
        if word:
            found.append(word)
            continue
        characters = _CHARACTER.findall(run)
        found += characters
        found += _pairs(characters)
    return found


def asked(question: str) -> set[str]:
    """The words to search for. A single character is a word only if it stands alone or is an ideograph."""
    wanted: set[str] = set()
    for run, word in _pieces(question):
        if word:
            wanted.add(word)
            continue
        characters = _CHARACTER.findall(run)
        wanted.update(_pairs(characters))
        wanted.update(each for each in characters if len(characters) == 1 or _IDEOGRAPH.match(each))
    return wanted


def _pairs(characters: list[str]) -> Iterator[str]:
    return (first + second for first, second in pairwise(characters))


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Pairs of a run of characters without spaces, and "", or of "" and a word."""
    for match in _RUN_OR_WORD.finditer(_folded(text)):
        run = match[1]
        yield (run, "") if run else ("", _ARTICLE.sub("", match[0], count=1) if match[0][0] >= "\u0600" else match[0])


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    apart = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    joined = unicodedata.normalize("NFKC", _OPTIONAL.sub("", apart)).translate(_SAME)
    return _DIGIT.sub(lambda digit: str(unicodedata.digit(digit[0])), joined)
