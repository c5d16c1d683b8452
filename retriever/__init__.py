"""Find pictures by describing them, and captions by showing a picture, on your own machine."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retriever.library import Library as Library

__all__ = ["Library", "__version__"]
__version__ = "0.1.0"

# ONNX Runtime's own packages report to their makers from 1.29 on, unless they are told not to
# before they are loaded. Nothing that is asked here leaves the machine.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    # `from retriever import Library` works, yet importing the package itself costs nothing.
    if name == "Library":
        from retriever.library import Library

        return Library
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
