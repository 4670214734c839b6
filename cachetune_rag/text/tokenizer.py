"""Tokenising content so that it can never become control tokens, however it is written.

A retrieved passage may contain `<|im_end|>` or `[INST]`. As text that is harmless; as a token it would end the user's
turn. Content is therefore encoded with special tokens switched off, literals of other added tokens that look like
control tokens are cut apart, and the result is checked: no control id gets past this module.
"""

from __future__ import annotations

import copy
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from cachetune_rag.concurrency.forks import this_process
from cachetune_rag.errors import PromptError, UnsupportedModelError
from cachetune_store.printing import shown

INSIDE = "\n"
"""The usual value of `after`: the text stands inside a prompt, so the tokenizer must not put its usual leading space before it."""

_INSIDE = (INSIDE, ")", "0")
"""Candidates to put before a text while it is tokenised as the middle of a prompt; the first that doesn't merge with it is taken."""

_LOOKS_LIKE_CONTROL = re.compile(r"<[^<>\s]+>|<[|｜].*[|｜]>|\[/?[A-Za-z_][\w/ -]*\]", re.DOTALL)
_REMEMBERED_BYTES = 32 << 20
"""Size of the cache of tokenised texts. It helps because the same passages are often retrieved again."""
_ENTRY_BYTES = 400
"""What an entry of that cache takes beside its text and ids. Without it, a million short questions would hardly count."""
_NEVER = re.compile(r"(?!)")


class ContentTokenizer:
    """A private copy of a tokenizer, with separate ways for content and for the developer's template text.

    The copy is what makes this thread-safe: transformers switches special tokens on and off by changing the tokenizer,
    and a lock can't keep out code that uses the caller's own object.

    Attributes:
        tokenizer: the copy.
        control: ids that content never yields.
        bos: ids that the tokenizer puts before every text by default (such as BOS); often one, often none.

    Raises:
        UnsupportedModelError: this tokenizer can't tell content from control tokens.
    """

    def __init__(self, tokenizer: Any):
        if not hasattr(tokenizer, "encode"):
            raise UnsupportedModelError(
                f"tokenizer is {shown(tokenizer)}, which can't encode text: load one with transformers.AutoTokenizer."
            )
        self.tokenizer = private_copy(tokenizer)
        self._origin = this_process()
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], tuple[int, ...]] = OrderedDict()
        self._known_bytes = 0
        self._known_lock = threading.Lock()
        try:
            plain = self._raw("a", special=False)
            with_bos = list(self.tokenizer.encode("a", add_special_tokens=True))
            added = dict(self.tokenizer.added_tokens_decoder)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} can't encode text with its special tokens switched off ({error}), so a "
                "passage could forge control tokens: load the model's tokenizer with transformers.AutoTokenizer."
            ) from error
        self.bos = tuple(with_bos[: _find(plain, with_bos)])
        controls, self._strip_left, self._strip_right = self._find_controls(added)
        self.control = frozenset(controls.values()) - self._unknown_id()
        self._cuts = _starts_of(controls)
        self._controls = frozenset(controls)
        self._longest = max(map(len, controls), default=0)
        self._heads = frozenset(literal[:n] for literal in controls for n in range(1, len(literal)))
        self._tails = frozenset(literal[n:] for literal in controls for n in range(1, len(literal)))
        self._literals = self._template_pattern(controls)
        # Sentencepiece-like tokenizers put a space before every text; inside a prompt that would be a second one.
        head, both = self._raw(INSIDE, special=False), self._raw(INSIDE + "a", special=False)
        self._adds_space = both[: len(head)] == head and both[len(head) :] != plain

    def encode(self, text: str, after: str = INSIDE) -> tuple[int, ...]:
        """Token ids of content, never a control id; the same text gives the same ids wherever it stands.

        Args:
            text: any text.
            after: what stands before the text, since some tokenizers depend on it: "" at the start of the prompt, the literal
                of a control token, or `INSIDE`.

        Raises:
            PromptError: the text is no valid Unicode (lone surrogates), or can't be kept apart from control tokens.
        """
        self.check_process()
        check_text(text)
        if not text:
            return ()
        with self._known_lock:
            if (known := self._known.get((text, after))) is not None:
                self._known.move_to_end((text, after))
                return known
        ids = tuple(self._encode(text, after))
        self._remember((text, after), ids)
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """What `encode` gives for each text. Faster for many texts, and other threads can run meanwhile, because the tokenizer
        releases Python's global lock. The results are not cached.

        Raises:
            PromptError: see `encode`.
        """
        self.check_process()
        for text in texts:
            check_text(text)
        before = INSIDE if self._adds_space else ""
        head = self._raw(before, special=False) if before else []
        # Texts that have to be cut, or for which `_continue` needs another leading text, are encoded one by one below.
        plain = [number for number, text in enumerate(texts) if text and len(self._cut(text)) == 1]
        found: dict[int, tuple[int, ...]] = {}
        if plain:
            with self._lock:
                encoded = self.tokenizer(
                    [before + texts[number] for number in plain],
                    add_special_tokens=False,
                    split_special_tokens=True,
                    padding=False,
                    truncation=False,
                    verbose=False,
                )["input_ids"]
            for number, ids in zip(plain, encoded, strict=True):
                own = ids[len(head) :]
                if ids[: len(head)] == head and self.control.isdisjoint(own):
                    found[number] = tuple(own)
        return [
            found[number] if number in found else tuple(self._encode(text, INSIDE) if text else ())
            for number, text in enumerate(texts)
        ]

    def _remember(self, key: tuple[str, str], ids: tuple[int, ...]) -> None:
        if _entry_bytes(key, ids) > _REMEMBERED_BYTES // 8:
            return
        with self._known_lock:
            if key not in self._known:
                self._known[key] = ids
                self._known_bytes += _entry_bytes(key, ids)
            while self._known_bytes > _REMEMBERED_BYTES:
                self._known_bytes -= _entry_bytes(*self._known.popitem(last=False))

    def _encode(self, text: str, after: str) -> list[int]:
        ids: list[int] = []
        for piece in self._cut(text):
            if not ids and after not in ("", INSIDE):
                first = self._continue(after, piece, special=True)
                if self.control.isdisjoint(first):
                    ids += first
                    continue
            ids += self._encode_piece(piece, after if not ids and after == "" else INSIDE)
        return ids

    def check_process(self) -> None:
        """Refuse to work in a process that was forked after this object was made. Another thread may have held a lock of this object or
        of the tokenizer at the moment of the fork; in the new process nobody would ever release it.

        Raises:
            ForkedError: this is such a process.
        """
        self._origin.check("the prompt builder", "its tokenizer may have been in use there, and stays locked here")

    def encode_control(self, literal: str) -> list[int]:
        """Token ids of one control token of a template, as `split_template` gives it."""
        return self._raw(literal, special=True)

    def split_template(self, text: str) -> list[tuple[str, bool]]:
        """Cut the developer's text into `(piece, is a control token)`; the pieces joined are the text.

        Whitespace that a token swallows (`lstrip`, `rstrip`) stays with it.
        """
        pieces: list[tuple[str, bool]] = []
        done = 0
        for match in self._literals.finditer(text):
            pieces.append((text[done : match.start()], False))
            pieces.append((match.group(), True))
            done = match.end()
        pieces.append((text[done:], False))
        return [piece for piece in pieces if piece[0]]

    # -- what is spelt like a control token -----------------------------------------------------------------------

    def is_control(self, text: str) -> bool:
        """Whether `text` is how a control token is written."""
        return text in self._controls

    def cuts(self, text: str) -> list[int]:
        """Where to cut a text so that no piece of it contains what is spelt like a control token."""
        return [match.start() + 1 for match in self._cuts.finditer(text)]

    def found(self, text: str) -> list[tuple[int, str]]:
        """Everything in a text that is spelt like a control token, overlaps included: (start, the longest such spelling there)."""
        found = []
        for match in self._cuts.finditer(text):
            start = match.start()
            lengths = range(min(self._longest, len(text) - start), 1, -1)
            found.append(
                (start, next(text[start : start + n] for n in lengths if text[start : start + n] in self._controls))
            )
        return found

    def loose_ends(self, text: str) -> tuple[bool, bool]:
        """Whether a text could complete a control token together with what stands before it, and with what stands behind it."""
        if not text:
            return False, False
        inside = len(text) <= self._longest and any(text in literal for literal in self._controls)
        lengths = range(1, self._longest)
        start = inside or any(text[:n] in self._tails for n in lengths)
        return start, inside or any(text[-n:] in self._heads for n in lengths)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _raw(self, text: str, *, special: bool) -> list[int]:
        with self._lock:
            ids = self.tokenizer.encode(
                text,
                add_special_tokens=False,
                split_special_tokens=not special,
                padding=False,
                truncation=False,
                verbose=False,
            )
        return list(ids)

    def _continue(self, after: str, text: str, *, special: bool) -> list[int]:
        """Ids of `text` when it stands right behind `after`. Where tokens span both and can't be separated: ids of `text` alone."""
        if after and self._adds_space:
            for before in _INSIDE if after == INSIDE else (after,):
                head, both = self._raw(before, special=special), self._raw(before + text, special=special)
                if both[: len(head)] == head:
                    return both[len(head) :]
        return self._raw(text, special=special)

    def _cut(self, text: str) -> list[str]:
        """Cut inside every literal of a control token, so that no piece contains one."""
        places = self.cuts(text)
        return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]

    def _encode_piece(self, piece: str, after: str) -> list[int]:
        ids = self._continue(after, piece, special=False)
        if self.control.isdisjoint(ids):
            return ids
        # A tokenizer can still yield a control id: by normalising odd characters into a literal, or because the literal is
        # an ordinary entry of its vocabulary. Repeated halving ends up cutting the literal, and leaves most other text whole.
        if len(piece) == 1:
            raise PromptError(
                f"{shown(piece)} (U+{ord(piece):04X}) is a control token for this tokenizer and has no spelling as plain "
                "text: remove it from the prompt's texts."
            )
        middle = len(piece) // 2
        return self._encode_piece(piece[:middle], after) + self._encode_piece(piece[middle:], INSIDE)

    def _find_controls(self, added: dict[int, Any]) -> tuple[dict[str, int], set[str], set[str]]:
        """Control tokens as literal -> id, and the literals that swallow whitespace left and right of them."""
        found = {str(t): i for i, t in added.items() if t.special or _LOOKS_LIKE_CONTROL.fullmatch(str(t))}
        found |= dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        # A single character (some use "!" to pad) is ordinary text too, and can't be spelt in another way.
        found = {literal: i for literal, i in found.items() if len(literal) > 1 and i is not None}
        left = {str(t) for t in added.values() if t.lstrip}
        right = {str(t) for t in added.values() if t.rstrip}
        return found, left, right

    def _unknown_id(self) -> frozenset[int]:
        """The id for text outside the vocabulary, as a set. Content may yield it, unless the same id is also that of BOS,
        EOS, padding, separator or class token; then the set is empty.
        """
        own = self.tokenizer
        others = {own.bos_token_id, own.eos_token_id, own.pad_token_id, own.sep_token_id, own.cls_token_id}
        return frozenset({own.unk_token_id} - others - {None})

    def _template_pattern(self, literals: Iterable[str]) -> re.Pattern[str]:
        found = sorted(literals, key=len, reverse=True)
        if not found:
            return _NEVER
        return re.compile(
            "|".join(
                (r"\s*" if literal in self._strip_left else "")
                + re.escape(literal)
                + (r"\s*" if literal in self._strip_right else "")
                for literal in found
            )
        )


def private_copy(tokenizer: Any) -> Any:
    """A copy of a tokenizer without the truncation and padding that calls leave behind in it.

    Other code may go on using or changing the original tokenizer: neither side affects the other.
    """
    own = copy.deepcopy(tokenizer)
    backend = getattr(own, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    templates = getattr(own, "chat_template", None)
    if isinstance(templates, list):  # as some tokenizers' files have them
        own.chat_template = {named["name"]: named["template"] for named in templates}
    return own


def check_text(text: object, name: str = "text") -> str:
    """`text` if it is a str that has a UTF-8 form.

    Raises:
        PromptError: it is not.
    """
    if not isinstance(text, str):
        raise PromptError(f"{name} is {shown(text)}, a {type(text).__name__}: use a str.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name} has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is half a "
            "character and no valid Unicode: decode its source anew, or drop it with "
            "text.encode('utf-8', 'ignore').decode()."
        ) from error
    return text


def _starts_of(literals: Iterable[str]) -> re.Pattern[str]:
    """A pattern with an empty match at every place where a literal begins, overlaps included."""
    tails: dict[str, list[str]] = {}  # by first character, which quickly rules out most places of a text
    for literal in literals:
        tails.setdefault(literal[0], []).append(re.escape(literal[1:]))
    if not tails:
        return _NEVER
    firsts = "".join(re.escape(first) for first in tails)
    branches = "|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in tails.items())
    return re.compile(f"(?=[{firsts}])(?={branches})", re.DOTALL)


def _find(part: list[int], whole: list[int]) -> int:
    """Where `part` begins in `whole`; 0 when it doesn't occur."""
    for start in range(len(whole) - len(part) + 1):
        if whole[start : start + len(part)] == part:
            return start
    return 0


def _entry_bytes(key: tuple[str, str], ids: tuple[int, ...]) -> int:
    """Memory of an entry of the cache of tokenised texts: ids are Python integers, of which only those below 257 are shared."""
    return _ENTRY_BYTES + sys.getsizeof(key[0]) + 40 * len(ids)
