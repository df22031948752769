"""What `PagedInt8Cache` makes of every public name of transformers' caches and of their layers.

Each row is a decision and a call that shows it; `eval.cache_api` makes the document, and the tests run the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import EncoderDecoderCache

SAME, DIFFERS, REFUSED = "same", "differs", "refused"
BATCH, HEADS, TOKENS, DIM, WINDOW, MAX_CACHE_LEN = 2, 2, 7, 16, 12, 64


class Row(NamedTuple):
    """A decision about one name.

    Attributes:
        call: what to do with a filled cache or layer; what it returns is compared.
        verdict: ``SAME``: returns what transformers' own returns, up to quantization. ``REFUSED``: raises, and
            the message contains the note. ``DIFFERS``: ``holds`` says in what.
        note: a sentence for the document.
        fresh: call it on one that was never used.
        raises: transformers' own raises too, an error of the same kind.
        holds: whether what ours returned, given what transformers' own returned or raised, is as the note says.
    """

    call: Callable[[Any], Any]
    verdict: str = SAME
    note: str = ""
    fresh: bool = False
    raises: bool = False
    holds: Callable[[Any, Any], bool] | None = None


def states(tokens: int, batch: int = BATCH) -> torch.Tensor:
    """Rows whose elements are all alike, one value per sequence and position: quantization keeps them up to the
    rounding of the scale to float16, one part in 2048."""
    rows = 1.0 + 100 * torch.arange(batch)[:, None] + torch.arange(tokens)[None]
    return rows[:, None, :, None].expand(batch, HEADS, tokens, DIM).clone()


def step(cache: Any, tokens: int = 1) -> list[torch.Tensor]:
    """One forward pass; the keys of every layer that attention sees, as plain tensors of at most ``TOKENS + 1``
    positions: what a preallocated cache has after them is nobody's business."""
    return [cache.update(states(tokens), -states(tokens), layer)[0].clone()[:, :, : TOKENS + 1] for layer in range(2)]


def contents(x: Any) -> list[torch.Tensor]:
    """Stored keys and values of a cache or of a layer, without the unused positions of a preallocated one."""
    if isinstance(x, EncoderDecoderCache):
        return contents(x.self_attention_cache) + contents(x.cross_attention_cache)
    layers = x.layers if hasattr(x, "layers") else [x]
    return [
        part.clone()[:, :, : int(layer.get_seq_length())] for layer in layers for part in (layer.keys, layer.values)
    ]


def lengths(cache: Any) -> list[int]:
    return [int(cache.get_seq_length(layer)) for layer in range(len(cache))]


def after(operation: str, *arguments: Any, then: Callable[[Any], Any] = contents) -> Callable[[Any], Any]:
    """Do this, and look at the result of ``then``."""

    def call(x: Any) -> Any:
        getattr(x, operation)(*arguments)
        return then(x)

    return call


def read(name: str) -> Callable[[Any], Any]:
    return lambda x: getattr(x, name)


def _attributes(*names: str) -> dict[str, Row]:
    return {name: Row(read(name)) for name in names}


ORDER, CHOICE = torch.tensor([1, 0]), torch.tensor([1])
EARLY = (BATCH, HEADS, DIM, torch.float32, "cpu")
_FIXED = "this cache was made without offloading=True"
_SEQUENCES = "layers share their sequences; call {}() of the cache"
_RING = "a window is a ring over all positions, so a layer with one answers as one without, max_cache_len"
_NO_OFFLOADING = {
    "prefetch": Row(lambda x: x.prefetch(0), REFUSED, _FIXED),
    "offload": Row(lambda x: x.offload(0), REFUSED, _FIXED),
}
_CACHE = (
    _attributes("is_compileable", "is_dummy", "is_initialized", "is_linear", "is_sliding")
    | _attributes("layer_class_to_replicate", "offloading", "max_cache_len")
    | _NO_OFFLOADING
    | {
        "__len__": Row(len),
        "__repr__": Row(repr, DIFFERS, "names our classes", holds=lambda ours, _: ours.startswith("PagedInt8Cache(")),
        "layers": Row(
            read("layers"),
            DIFFERS,
            "a list of our layers, and of transformers' own where nothing is held per token",
            holds=lambda ours, theirs: len(ours) == len(theirs) and "PagedInt8" in repr(ours),
        ),
        "get_seq_length": Row(lengths),
        "get_query_offset": Row(lambda c: int(c.get_query_offset())),
        "get_max_cache_shape": Row(lambda c: c.get_max_cache_shape(), note="transformers 5.18 only"),
        "is_recording_past": Row(lambda c: c.is_recording_past(1)),
        "activate_past_recording": Row(lambda c: c.activate_past_recording()),
        "reset": Row(after("reset", then=lengths)),
        "reorder_cache": Row(after("reorder_cache", ORDER)),
        "early_initialization": Row(after("early_initialization", *EARLY, then=read("is_initialized")), fresh=True),
        "get_conv_state": Row(lambda c: c.get_conv_state(0), raises=True, note="for linear-attention layers"),
        "get_recurrent_state": Row(lambda c: c.get_recurrent_state(0), raises=True, note="for linear-attention layers"),
        "has_previous_state": Row(lambda c: c.has_previous_state(0), raises=True, note="for linear-attention layers"),
        "update_conv_state": Row(lambda c: c.update_conv_state(states(1), 0), raises=True, note="as above"),
        "update_recurrent_state": Row(lambda c: c.update_recurrent_state(states(1), 0), raises=True, note="as above"),
        "update_indexer": Row(lambda c: c.update_indexer(states(1), 0), raises=True, note="for indexed layers"),
    }
)
_REAL_BATCH = "the batch size, where DynamicCache answers -1 as its layers do not keep it"
GROWING_CACHE = _CACHE | {
    "__iter__": Row(lambda c: [tuple(None if x is None else x.clone() for x in layer) for layer in c]),
    "update": Row(step),
    "get_max_length": Row(lambda c: [c.get_max_length(), c.get_max_length(0), c.get_max_length(1)]),
    "get_mask_sizes": Row(lambda c: [c.get_mask_sizes(q, layer) for q in (1, 3, 20) for layer in range(2)]),
    "is_croppable": Row(read("is_croppable")),
    "crop": Row(after("crop", -3)),
    "batch_repeat_interleave": Row(after("batch_repeat_interleave", 2)),
    "batch_select_indices": Row(after("batch_select_indices", CHOICE)),
    "batch_size": Row(read("batch_size"), DIFFERS, _REAL_BATCH, holds=lambda ours, _: ours == BATCH),
    "max_batch_size": Row(read("max_batch_size"), DIFFERS, _REAL_BATCH, holds=lambda ours, _: ours == BATCH),
}
_MASKS = "always all positions, also of a layer with a window: what was compiled for one step serves all"
_COPIES = "copies blocks, for up to max_batch_size sequences; StaticCache has none"
PREALLOCATED_CACHE = (
    _CACHE
    | _attributes("batch_size", "max_batch_size")
    | {
        "update": Row(step, note="several tokens at once return the positions in use, not max_cache_len of them"),
        "get_max_length": Row(
            lambda c: [c.get_max_length(), c.get_max_length(0), c.get_max_length(1)],
            DIFFERS,
            _RING,
            holds=lambda ours, _: ours == [MAX_CACHE_LEN] * 3,
        ),
        "get_mask_sizes": Row(
            lambda c: [c.get_mask_sizes(q, layer) for q in (1, 3) for layer in range(2)],
            DIFFERS,
            _MASKS,
            holds=lambda ours, _: ours == [(MAX_CACHE_LEN, 0)] * 4,
        ),
        "is_croppable": Row(
            read("is_croppable"), DIFFERS, "StaticCache says False", holds=lambda ours, _: isinstance(ours, bool)
        ),
        "crop": Row(
            after("crop", -3, then=lengths),
            DIFFERS,
            "takes tokens back, which StaticCache cannot before transformers 5.24",
            holds=lambda ours, _: ours == [TOKENS - 3] * 2,
        ),
        "batch_repeat_interleave": Row(
            after("batch_repeat_interleave", 1), DIFFERS, _COPIES, holds=lambda ours, _: len(ours[0]) == BATCH
        ),
        "batch_select_indices": Row(
            after("batch_select_indices", CHOICE), DIFFERS, _COPIES, holds=lambda ours, _: len(ours[0]) == 1
        ),
    }
)
_LAYER = _attributes("device", "dtype", "is_compileable", "is_initialized", "is_sliding", "supports_early_init") | {
    "offload": Row(lambda x: x.offload(), REFUSED, _FIXED),
    "prefetch": Row(lambda x: x.prefetch(), REFUSED, _FIXED),
    "__repr__": Row(repr, DIFFERS, "names our classes", holds=lambda ours, _: ours.startswith("PagedInt8")),
    "keys": Row(lambda x: contents(x)[0]),
    "values": Row(lambda x: contents(x)[1]),
    "cumulative_length": Row(lambda x: int(x.cumulative_length)),
    "get_seq_length": Row(lambda x: int(x.get_seq_length())),
    "get_max_cache_shape": Row(lambda x: x.get_max_cache_shape(), note="transformers 5.18 only"),
    "update": Row(lambda x: x.update(states(1), -states(1))[0].clone()[:, :, : TOKENS + 1]),
    "lazy_initialization": Row(
        after("lazy_initialization", states(0), states(0), then=read("is_initialized")), fresh=True
    ),
}
GROWING_LAYER = (
    _LAYER
    | _attributes("is_croppable", "record_past", "sliding_window")
    | {
        name: Row(after(name, *arguments), REFUSED, _SEQUENCES.format(name))
        for name, arguments in {
            "activate_past_recording": (),
            "batch_repeat_interleave": (2,),
            "batch_select_indices": (CHOICE,),
            "crop": (-3,),
            "reorder_cache": (ORDER,),
            "reset": (),
        }.items()
    }
    | {
        "get_max_length": Row(lambda x: x.get_max_length()),
        "get_mask_sizes": Row(lambda x: [x.get_mask_sizes(q) for q in (1, 3, 20)]),
    }
)
PREALLOCATED_LAYER = (
    _LAYER
    | _attributes("batch_size", "cumulative_length_int", "k_head_dim", "num_heads", "v_head_dim")
    | {
        "is_croppable": PREALLOCATED_CACHE["is_croppable"],
        "crop": Row(after("crop", -3), REFUSED, _SEQUENCES.format("crop")),
        "reorder_cache": Row(after("reorder_cache", ORDER), REFUSED, _SEQUENCES.format("reorder_cache")),
        "reset": Row(after("reset"), REFUSED, _SEQUENCES.format("reset")),
        "max_cache_len": Row(read("max_cache_len"), DIFFERS, _RING, holds=lambda ours, _: ours == MAX_CACHE_LEN),
        "get_max_length": Row(
            lambda x: x.get_max_length(), DIFFERS, _RING, holds=lambda ours, _: ours == MAX_CACHE_LEN
        ),
        "get_max_cache_shape": Row(
            lambda x: x.get_max_cache_shape(), DIFFERS, _RING, holds=lambda ours, _: ours == MAX_CACHE_LEN
        ),
        "get_mask_sizes": Row(
            lambda x: [x.get_mask_sizes(q) for q in (1, 3)],
            DIFFERS,
            _MASKS,
            holds=lambda ours, _: ours == [(MAX_CACHE_LEN, 0)] * 2,
        ),
    }
)
_UNDEFINED = "EncoderDecoderCache itself has no layers, whatever it holds"
ENCODER_DECODER = (
    {name: row._replace(raises=True, verdict=SAME, note=_UNDEFINED, holds=None) for name, row in GROWING_CACHE.items()}
    | {
        name: GROWING_CACHE[name]
        for name in (
            "__len__", "get_seq_length", "get_max_length", "get_mask_sizes", "reset", "reorder_cache", "is_sliding",
            "batch_repeat_interleave", "batch_select_indices", "is_compileable", "is_croppable",
            "activate_past_recording",
        )
    }
    | {
        "__iter__": Row(lambda c: [tuple(None if x is None else x.clone() for x in layer) for layer in c]),
        "__repr__": Row(
            repr, DIFFERS, "names our classes", holds=lambda ours, _: ours.count("PagedInt8Cache(") == 2
        ),
        "crop": Row(after("crop", -3)),
        "check_dynamic_cache": Row(lambda c: c.check_dynamic_cache("crop")),
        "is_updated": Row(read("is_updated")),
        "self_attention_cache": Row(lambda c: contents(c.self_attention_cache)),
        "cross_attention_cache": Row(lambda c: contents(c.cross_attention_cache)),
    }
)  # fmt: skip
