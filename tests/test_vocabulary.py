import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from retriever.errors import EncoderError, UsageError
from retriever.vocabulary import extend

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[unused1]", "dog", "cat", "##s", "a", "狗", "собака"]
WORDS += ["runs", "sleeps", "x"]
# Each of these pictures shows one animal that does one thing.
ANIMALS, DEEDS = {"dog": "小狗", "cat": "猫咪"}, {"runs": "奔跑", "sleeps": "睡觉"}
PICTURES = [
    (
        f"a {animal} {deed}",
        f"{ANIMALS[animal]}在{DEEDS[deed]}。",
        f"{DEEDS[deed]}的{ANIMALS[animal]}",
    )
    for animal in ANIMALS
    for deed in DEEDS
] * 4


def bert() -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(WORDS), 16)).astype(np.float32)


def extended(size: int = 40) -> tuple[Tokenizer, np.ndarray]:
    return extend(bert(), vectors(), PICTURES, size)


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


def test_words_of_the_captions_are_found_at_the_beginning_of_a_run_and_inside_it():
    tokenizer, made = extended()
    assert len(made) == tokenizer.get_vocab_size()
    assert "".join(words_of(tokenizer, "小狗在睡觉")).replace("##", "") == "小狗在睡觉"
    assert "[UNK]" not in words_of(tokenizer, "睡觉小狗")
    assert words_of(tokenizer, "小狗")[0].startswith("小")


def test_what_the_tokenizer_knew_is_cut_as_before_and_keeps_its_vector():
    tokenizer, made = extended()
    old, before = bert(), vectors()
    for text in ("A dog runs", "cats", "a zebra", "dog 小狗"):
        latin = text.removesuffix(" 小狗")
        was, now = old.encode(latin), tokenizer.encode(text)
        assert now.tokens[: len(was.tokens) - 1] == was.tokens[:-1]
        places = now.ids[: len(was.ids) - 1]
        np.testing.assert_array_equal(made[places], before[was.ids[:-1]])
    assert tokenizer.encode("dog").tokens == ["[CLS]", "dog", "[SEP]"]


def test_reserved_tokens_and_scripts_that_no_caption_uses_make_room():
    vocabulary = extended()[0].get_vocab()
    assert not vocabulary.keys() & {"[unused1]", "собака"}
    assert vocabulary.keys() >= {"x", "dog", "##s"}


def test_one_unknown_character_leaves_the_rest_of_its_run_known():
    tokens = words_of(extended()[0], "小狗龘睡觉")
    assert tokens.count("[UNK]") == 1
    assert "小狗" in "".join(tokens).replace("##", "")


def test_a_new_word_begins_near_the_word_that_it_stands_for():
    tokenizer, made = extended()
    vocabulary = tokenizer.get_vocab()
    centred = made - vectors()[[i for i, w in enumerate(WORDS) if w in vocabulary]].mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    known = ["dog", "cat", "runs", "sleeps"]
    for english, chinese in (ANIMALS | DEEDS).items():
        # Of a word in pieces, all pieces together.
        mixed = centred[tokenizer.encode(chinese, add_special_tokens=False).ids].sum(axis=0)
        scores = {word: float(mixed @ centred[vocabulary[word]]) for word in known}
        assert max(scores, key=scores.__getitem__) == english
    starts = {
        word: i for word, i in vocabulary.items() if f"##{word}" in vocabulary and word > "～"
    }
    for word, i in starts.items():
        np.testing.assert_array_equal(made[i], made[vocabulary[f"##{word}"]])


def test_without_a_caption_in_such_a_script_there_is_nothing_to_learn():
    with pytest.raises(UsageError, match="no caption has words in a script without spaces"):
        extend(bert(), vectors(), [["a dog"], ["a cat"]], 10)


def test_the_extended_tokenizer_survives_being_saved(tmp_path):
    tokenizer, _ = extended()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode("a dog 小狗龘在睡觉。").ids == tokenizer.encode("a dog 小狗龘在睡觉。").ids
    assert json.loads(again.to_str()) == json.loads(tokenizer.to_str())


def test_a_tokenizer_of_another_kind_is_refused():
    with pytest.raises(EncoderError, match="WordPiece"):
        extend(Tokenizer(models.WordLevel({"a": 0})), vectors(), PICTURES, 10)
