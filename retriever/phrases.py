"""Plain descriptions of everyday pictures, which stand for queries where a library has no captions.

An approximate index is tuned with texts as people ask for them. These need not fit the library:
they lie where texts lie in the shared space, and that is what makes an index harder to search.
"""

from itertools import product

WHO = (
    *("a dog", "two children", "an old man", "a woman in a red coat", "a crowd of people"),
    *("a cat", "a bird", "a horse", "a black car", "a bicycle", "a boat", "a train"),
    *("flowers", "a plate of food", "an empty chair", "a tall building"),
)
WHERE = (
    *("on the beach", "in the snow", "in a kitchen", "at night", "in a busy street", "on a table"),
    *("under a tree", "by the river", "in front of a window", "in the mountains", "at a party"),
    *("on a green field", "in the rain", "at sunset", "in black and white", "seen from above"),
)


def phrases() -> list[str]:
    """256 descriptions, always the same ones in the same order."""
    return [f"{who} {where}" for who, where in product(WHO, WHERE)]
