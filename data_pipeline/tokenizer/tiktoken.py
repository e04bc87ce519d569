"""Convert a .tiktoken vocabulary to a tokenizer.json.

A .tiktoken file has a line per token: its bytes in base64 and its rank, which is its id. The pattern that cuts a text
before merging and the special tokens are not in the file; whoever publishes it names them.

It is converted and not read by its own library, so that stores know two formats of tokenizers and not three. tiktoken
merges the neighbours whose union has the lowest rank; a tokenizer.json lists merges in their order. Listing every split of
every token into two tokens, by the rank of the whole, gives the same result.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path

from amfm.data_pipeline.tokenizer.huggingface import parse_tokenizer


def convert_tiktoken(path: Path, *, pattern: str, special_tokens: Mapping[str, int]) -> bytes:
    """Convert a .tiktoken file to the content of a tokenizer.json that gives the same ids.

    pattern: regular expression of the pieces that merges never cross. special_tokens: id by text, outside the ranks.
    ValueError for a broken file, a broken pattern, or ids that clash.
    """
    ranks = _read_ranks(path)
    by_id = {rank: token for token, rank in ranks.items()}
    for text, index in special_tokens.items():
        if index in by_id:
            raise ValueError(f"special token {text!r} has id {index}, which is a token of {path}; give its own id")
    letters = _byte_letters()
    texts = {token: "".join(letters[byte] for byte in token) for token in ranks}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {texts[token]: rank for token, rank in ranks.items()} | dict(special_tokens)
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **added} for text, index in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None,
        "decoder": to_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is taken whole, whatever merges lead to it
            "vocab": vocabulary,
            "merges": [[texts[left], texts[right]] for left, right in _rank_merges(ranks)],
        },
    }
    content = json.dumps(document, ensure_ascii=False).encode()
    try:
        parse_tokenizer(content)
    except ValueError as error:
        raise ValueError(
            f"{path} with pattern {pattern!r} gives no tokenizer ({error}); correct the pattern"
        ) from error
    return content


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Read rank by token; ValueError if lines or ranks are broken or a single byte has no token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}: line {number} is not `base64 rank` ({error}); restore the file") from error
    if not ranks or len(set(ranks.values())) != len(ranks):
        raise ValueError(f"{path} has {len(ranks)} tokens of {len(set(ranks.values()))} ranks; restore the file")
    missing = sorted(set(range(256)) - {token[0] for token in ranks if len(token) == 1})
    if missing:
        raise ValueError(f"{path} has no token for byte {missing[0]}; a byte-level vocabulary has all 256")
    return ranks


def _rank_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """List every pair of tokens whose union is a token, the union of the lowest rank first: what a rank means."""
    merges = [
        (rank, ranks[token[:cut]], token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return [(left, right) for _, _, left, right in sorted(merges)]


def _byte_letters() -> list[str]:
    """List the letter that stands for each byte in a byte-level tokenizer.json.

    Printable bytes of Latin-1 stand for themselves, the others for the letters from U+0100 on, in their order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]
