"""What kernels have worked out about an object and keep with it: checked sizes, packed addresses."""

from __future__ import annotations

from typing import Any


class Notes(dict[str, Any]):
    """Notes about an object whose fields cannot be replaced, by the name of who wrote them, made when first needed.

    They come and go with the object. A deep or pickled copy of it has other tensors, so its notes begin empty.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Notes:
        return Notes()

    def __reduce__(self) -> tuple[type[Notes], tuple[()]]:
        return Notes, ()
