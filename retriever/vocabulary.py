"""A pretrained tokenizer that learns the words of another script.

A tower pretrained on English knows Chinese, if at all, by single characters that mean nothing to
it. Captions in both languages of the same pictures say what the words mean: each new word begins
as a mixture of the vectors of the words that it stands for, so that the layers above understand it
before they have learned anything.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from retriever.errors import EncoderError, UsageError

# Scripts without spaces between words: kana, Han, and Han beyond the basic plane.
_UNSPACED_RANGES = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED = re.compile(f"[{_UNSPACED_RANGES}]+")
# What stays of the old vocabulary whether a caption uses it or not.
_LATIN = re.compile("[ -~\u00a0-\u024f\u2000-\u206f\u20a0-\u20bf\u3000-\u3002\uff00-\uff65]+")
_RESERVED = re.compile(r"\[unused\d+\]")
_LEAST_COUNT, _COHESION = 4, 0.4  # of a pair of characters that is taken for a word
_LONGEST_RUN = 1000  # characters; what is longer is unknown as a whole
_ROUNDS = 8


def extend(
    tokenizer: Tokenizer, vectors: NDArray[np.float32], pictures: Sequence[Sequence[str]], size: int
) -> tuple[Tokenizer, NDArray[np.float32]]:
    """The tokenizer with words of scripts that are written without spaces, and all its vectors.

    The words are all characters of the captions, and the pairs of them that belong together. Each
    is there twice, at the beginning of a run of characters and inside it, as a WordPiece model cuts
    a run greedily from its beginning. Tokens that are reserved, and those of scripts which no
    caption uses, make room.

    Args:
        tokenizer: a WordPiece model, such as BERT's.
        vectors: (v, f) one for each of its tokens.
        pictures: the captions of each picture, in all languages.
        size: words to add, at most.

    Returns:
        The tokenizer, and (w, f) its tokens' vectors.

    Raises:
        EncoderError: the tokenizer is of another kind.
        UsageError: no caption is in such a script.
    """
    spec = json.loads(tokenizer.to_str())
    if spec["model"]["type"] != "WordPiece" or (spec["normalizer"] or {}).get("type") != (
        "BertNormalizer"
    ):
        raise EncoderError("words can be added to a BERT-like WordPiece tokenizer only")
    runs = Counter(run for captions in pictures for text in captions for run in _runs(text))
    if not runs:
        raise UsageError("no caption has words in a script without spaces: leave add_words out")
    words = _words(runs, size)
    prefix = spec["model"]["continuing_subword_prefix"]
    used = {t for captions in pictures for one in captions for t in tokenizer.encode(one).ids}
    names = [name for name, _ in sorted(tokenizer.get_vocab().items(), key=lambda one: one[1])]
    special = {token["id"] for token in spec["added_tokens"]}
    kept = [i for i, name in enumerate(names) if i in special or _is_kept(name, i in used)]
    added = [name for word in words for name in (word, prefix + word)]
    spec["model"]["vocab"] = {name: i for i, name in enumerate([*(names[i] for i in kept), *added])}
    place = {old: new for new, old in enumerate(kept)}
    for token in spec["added_tokens"]:
        token["id"] = place[token["id"]]
    for token in ((spec["post_processor"] or {}).get("special_tokens") or {}).values():
        token["ids"] = [place[i] for i in token["ids"]]
    # Otherwise every character of such a script would be put between spaces.
    spec["normalizer"]["handle_chinese_chars"] = False
    spec["model"]["max_input_chars_per_word"] = _LONGEST_RUN
    # One unknown character would make its whole run unknown, so it is a run of its own.
    known = re.escape("".join(word for word in words if len(word) == 1))
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": f"[{_UNSPACED_RANGES}&&[^{known}]]"},
                "behavior": "Isolated",
                "invert": False,
            },
            spec["pre_tokenizer"],
        ],
    }
    extended = Tokenizer.from_str(json.dumps(spec))
    old = vectors[kept]
    new = _begun(extended, old, pictures, words)
    return extended, np.concatenate([old, new])


def _runs(text: str) -> list[str]:
    return _UNSPACED.findall(text)


def _parts(run: str) -> set[str]:
    """All characters of a run, and all pairs."""
    return {*run, *(run[i : i + 2] for i in range(len(run) - 1))}


def _is_kept(name: str, is_used: bool) -> bool:
    if _RESERVED.fullmatch(name) or _UNSPACED.search(name):
        return False
    return is_used or bool(_LATIN.fullmatch(name))


def _words(runs: Counter[str], size: int) -> list[str]:
    """All characters, and pairs of them that stand together far more often than by chance.

    What is longer is cut into these. It would be found as well, but of frequent threes and fours
    most are phrases of these captions; and a pair with a particle is no word either. Normalised
    pointwise mutual information says so, 1 for what never stands apart, 0 for chance: Bouma 2009,
    Normalized (Pointwise) Mutual Information in Collocation Extraction.
    """
    singles, pairs = Counter[str](), Counter[str]()
    for run, count in runs.items():
        for i, character in enumerate(run):
            singles[character] += count
            if i:
                pairs[run[i - 1 : i + 1]] += count
    total = singles.total()
    words = []
    for pair, count in pairs.most_common():
        information = math.log(count * total / (singles[pair[0]] * singles[pair[1]]))
        if count >= _LEAST_COUNT and information >= _COHESION * math.log(total / count):
            words.append(pair)
    return sorted(singles) + words[: max(size - len(singles), 0)]


def _begun(
    tokenizer: Tokenizer,
    old: NDArray[np.float32],
    pictures: Sequence[Sequence[str]],
    words: Sequence[str],
) -> NDArray[np.float32]:
    """(2 · words, f) vectors of the new tokens, mixed from the old ones by `_translations`.

    A word has one vector for its two tokens; one that no picture explains gets the mean.
    """
    place = {word: i for i, word in enumerate(words)}
    foreign, known = [], []
    for captions in pictures:
        # Also the words inside longer ones: another run may have them by themselves.
        parts = {part for text in captions for run in _runs(text) for part in _parts(run)}
        foreign.append(np.array(sorted(place[one] for one in parts & place.keys()), np.int64))
        ids = {i for text in captions for i in tokenizer.encode(text, add_special_tokens=False).ids}
        known.append(np.array(sorted(i for i in ids if i < len(old)), np.int64))
    shares, used = _translations(foreign, known, len(words))
    mean = old.mean(axis=0)
    mixed = shares @ (old[used] - mean)
    length = np.linalg.norm(old - mean, axis=1).mean()
    norms = np.linalg.norm(mixed, axis=1, keepdims=True)
    mixed *= np.divide(length, norms, out=np.zeros_like(norms), where=norms > 0)
    return np.repeat((mixed + mean).astype(np.float32), 2, axis=0)


def _translations(
    foreign: Sequence[NDArray[np.int64]], known: Sequence[NDArray[np.int64]], words: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(words, t): how likely each known token stands for a foreign word, and (t,) these tokens.

    Rows sum to 1, or to 0 for a word that no picture explains. IBM's first model of translation,
    with a picture for a sentence: every known token of a picture is explained by one of its foreign
    words, or by none, which takes what stands everywhere.
    Brown et al. 1993, aclanthology.org/J93-2003.
    """
    pairs = [(f, k) for f, k in zip(foreign, known, strict=True) if len(f) and len(k)]
    used, columns = np.unique(
        np.concatenate([np.zeros(0, np.int64), *(k for _, k in pairs)]), return_inverse=True
    )
    ends = np.cumsum([len(k) for _, k in pairs])
    # The last row is the word that is none.
    blocks = [
        np.ix_(np.append(f, words), column)
        for (f, _), column in zip(pairs, np.split(columns, ends[:-1]), strict=False)
    ]
    chance = np.full((words + 1, len(used)), 1 / max(len(used), 1), np.float32)
    for _ in range(_ROUNDS):
        counts = np.zeros_like(chance)
        for block in blocks:
            share = chance[block]
            counts[block] += share / share.sum(axis=0)
        totals = counts.sum(axis=1, keepdims=True)
        chance = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    return chance[:-1], used
