"""Tokenise the two sets of the selection study; README.md beside this file says where the texts come from."""

from __future__ import annotations

import argparse
import gzip
import html
import json
import random
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

CHUNK, CHUNKS, QUERY, TARGET, EACH = 512, 8, 16, 64, 20
SOURCES = {  # patterns below the folder that the packages were unpacked into
    "python": [
        f"usr/share/doc/python3.11/html/_sources/{p}" for p in ("tutorial/*", "howto/*", "whatsnew/2.*", "faq/*")
    ],
    "git": [
        f"usr/share/doc/git/html/{p}"
        for p in ("user-manual.html", "gitcore-tutorial.html", "howto/*.html", "technical/*.html")
    ],
    "postgres": ["usr/share/doc/postgresql-doc-15/html/*.html"],
    "debian": [
        "usr/share/doc/debian-reference/**/*.en.html",
        "usr/share/doc/developers-reference/*.html",
        "usr/share/debian-reference/*.en.html",
        "usr/share/doc/debian/FAQ/*.en.html",
        "usr/share/developers-reference/*.html",
    ],
}
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n"
ANSWER = "Answer the question after reading several passages. Answer within 5 words.\nPassages:\n"
QUESTION = (
    "\nAnswer the question directly based on the given passages. The answer should be within 5 words.\n"
    "Question: {}<|im_end|>\n<|im_start|>assistant\n"
)


def text_of(path: Path) -> str:
    """The words of a page: HTML without navigation and tags, anything else as it is."""
    raw = text = path.read_text(errors="ignore")
    if path.suffix == ".html":
        body = re.search(r'<(?:div class="body"|body)[^>]*>', text)
        text = text[body.end() :] if body else text
        text = re.sub(r"(?s)<(script|style|nav|head)\b.*?</\1>", "", text)
        if 'class="body"' in raw:
            text = re.sub(r'(?s)<div class="(?:sphinxsidebar|related|footer).*', "", text)
        text = re.sub(r"(?i)</(p|li|h\d|dt|dd|pre|tr|div)>", "\n", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", text)).replace("¶", "")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text))


def documents(folder: Path, encode: Any) -> list[dict[str, Any]]:
    """From each source `EACH` runs of contiguous tokens: chunks, a query, a target."""
    rng, samples = random.Random(7), []
    size = CHUNK * CHUNKS + QUERY + TARGET
    for source, patterns in SOURCES.items():
        texts = map(text_of, sorted((p for pattern in patterns for p in folder.glob(pattern)), key=str))
        tokens = [encode(text) for text in texts if len(text) > 18000]
        places = [(d, start) for d, ids in enumerate(tokens) for start in range(100, len(ids) - size, size)]
        rng.shuffle(places)
        for d, start in places[:EACH]:
            ids = tokens[d][start : start + size]
            end = CHUNK * CHUNKS
            chunks = [ids[i : i + CHUNK] for i in range(0, end, CHUNK)]
            samples.append(
                {"src": source, "chunks": chunks, "query": ids[end : end + QUERY], "ans": ids[end + QUERY :]}
            )
    rng.shuffle(samples)
    return samples


def questions(path: Path, encode: Any) -> list[dict[str, Any]]:
    """MuSiQue: a chunk a passage, the question, the gold answer."""
    with gzip.open(path, "rt") as file:
        records = [json.loads(line) for line in file]
    return [
        {
            "chunks": [encode(f"{p['title']}\n\n{p['text']}\n\n") for p in record["passages"]],
            "query": encode(QUESTION.format(record["question"])),
            "ans": encode(record["answers"][0] + "<|im_end|>"),
        }
        for record in records
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder, for its tokenizer")
    parser.add_argument("--docs", type=Path, required=True, help="folder that the Debian packages were unpacked into")
    parser.add_argument("--musique", type=Path, required=True, help="questions, gzipped JSON lines")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    data = {
        "BOS": tokenizer.bos_token_id,
        "sysq": encode(SYSTEM + ANSWER),
        "sysd": encode(SYSTEM + "Read the passages.\n\n"),
        "musique": questions(args.musique, encode),
        "docs": documents(args.docs, encode),
    }
    args.out.write_text(json.dumps(data))


if __name__ == "__main__":
    main()
