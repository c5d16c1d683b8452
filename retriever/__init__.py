"""Find pictures by describing them, and captions by showing a picture, on your own machine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retriever.library import Library as Library

__all__ = ["Library", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # `from retriever import Library` works, yet importing the package itself costs nothing.
    if name == "Library":
        from retriever.library import Library

        return Library
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
