"""The bundled encoder as it is shipped: whole, small, and able to tell real photographs apart."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from retriever.encoders import OnnxEncoder, load_encoder
from retriever.models import MINI_FOLDER

MAX_BYTES = 36_000_000
FILES = ("image.onnx", "text.onnx", "text.weights", "tokenizer.json")


@pytest.fixture(scope="module")
def mini() -> OnnxEncoder:
    encoder = load_encoder("mini")
    assert isinstance(encoder, OnnxEncoder)
    return encoder


@pytest.fixture(scope="module")
def photographs() -> list[Path]:
    package = find_spec("skimage")
    assert package is not None
    assert package.origin is not None
    data = Path(package.origin).parent / "data"
    names = ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png")
    return [data / name for name in (*names, "hubble_deep_field.jpg", "coins.png", "camera.png")]


@pytest.fixture(scope="module")
def pictures(mini, photographs) -> np.ndarray:
    return mini.encode_images(photographs)


def test_its_files_are_the_ones_that_its_config_describes(mini):
    assert mini.verify() == []


def test_it_is_small_enough_to_be_bundled():
    assert sum((MINI_FOLDER / name).stat().st_size for name in FILES) <= MAX_BYTES


def test_the_model_card_and_the_table_of_models_give_the_same_recall():
    config = json.loads((MINI_FOLDER / "config.json").read_text("utf-8"))
    card = (MINI_FOLDER / "MODEL_CARD.md").read_text("utf-8")
    row = next(line for line in card.splitlines() if line.startswith("| Flickr8k test"))
    shown = [float(cell) for cell in re.findall(r"\d+\.\d", row)]
    recall = config["recall"]["flickr8k"]
    wanted = [recall[f"{way}_r@{k}"] for way in ("t2i", "i2t") for k in (1, 5, 10)]
    assert [value for value in wanted if value not in shown] == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a cat", "chelsea.png"),
        ("A CAT", "chelsea.png"),
        ("a cup of coffee", "coffee.png"),
        ("a red motorcycle", "motorcycle_left.png"),
        ("a man with a camera", "camera.png"),
        # Words that no caption of the training data holds.
        ("a feline", "chelsea.png"),
        ("an espresso", "coffee.png"),
        ("galaxies", "hubble_deep_field.jpg"),
        ("一只猫", "chelsea.png"),
        ("一杯咖啡", "coffee.png"),
        ("一辆红色的摩托车", "motorcycle_left.png"),
        ("一个拿着相机的男人", "camera.png"),
        ("一只 cat", "chelsea.png"),
    ],
)
def test_a_description_finds_its_photograph(mini, pictures, photographs, text, name):
    scores = pictures @ mini.encode_texts([text])[0]
    assert photographs[int(scores.argmax())].name == name


def test_a_sentence_in_one_language_finds_the_same_in_the_other(mini):
    english = [
        "a dog runs on the beach",
        "two children play in the snow",
        "a man rides a bicycle in the street",
        "a woman in a red dress sings",
        "football players on a green field",
    ]
    chinese = [
        "一只狗在沙滩上奔跑",
        "两个孩子在雪地里玩耍",
        "一个男人在街上骑自行车",
        "一个穿红裙子的女人在唱歌",
        "绿色球场上的足球运动员",
    ]
    scores = mini.encode_texts(english) @ mini.encode_texts(chinese).T
    assert scores.argmax(axis=0).tolist() == scores.argmax(axis=1).tolist() == [0, 1, 2, 3, 4]


def test_an_embedding_does_not_depend_on_what_is_encoded_beside_it(mini, pictures, photographs):
    # Other batch sizes take other paths through ONNX Runtime: rounding of float32 sums.
    alone = mini.encode_images(photographs[:1])
    np.testing.assert_allclose(alone[0], pictures[0], atol=1e-5)
    texts = ["a dog", "two dogs run over a wide green field after a small yellow ball"]
    together = mini.encode_texts(texts)
    np.testing.assert_allclose(mini.encode_texts(texts[:1])[0], together[0], atol=1e-5)


def test_a_mirrored_photograph_stays_close(mini, photographs):
    from PIL import Image, ImageOps

    with Image.open(photographs[0]) as image:
        picture = image.convert("RGB")
    rows = mini.encode_images([picture, ImageOps.mirror(picture)])
    assert rows[0] @ rows[1] > 0.9
