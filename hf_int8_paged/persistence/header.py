"""What a file says of the cache in it, beside the tensors: one JSON object, read with every type and range checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ..kernels import FORMATS, MAX_FIRST_TOKENS, MAX_HEAD_DIM, ROTATIONS
from .fields import Fields
from .other_layers import DTYPE_NAMES
from .tensor_file import CacheFileMismatchError, TensorFile

#: Raised by one when an older release could not read a file any more.
FORMAT_VERSION = 1
#: Name of the header's entry.
ENTRY = "hf_int8_paged"
GROWING, PREALLOCATED = "growing", "preallocated"
#: Larger numbers of tokens, blocks or sequences are no cache's.
_MOST = 2**31 - 1


@dataclass(frozen=True)
class LayerHeader:
    """One layer.

    Attributes:
        class_name: of the cache's layer.
        group: of a layer that holds keys and values, the name of its block table; None of the others.
        num_kv_heads: heads of keys and of values, 0 before the first ones.
        head_dim: width of a key row.
        v_head_dim: width of a value row.
        device: where they were.
        dtypes: in which dense keys and values are shown.
        centred: whether the mean of the first keys has been subtracted; its centre is a tensor then.
        first_tokens: dtype of the rows in full precision, or None without.
        first_held: in a preallocated window: position of the first token that is not overwritten.
        state: of the part of a layer that is transformers' own; None without one.
    """

    class_name: str
    group: str | None = None
    num_kv_heads: int = 0
    head_dim: int = 0
    v_head_dim: int = 0
    device: str = "cpu"
    dtypes: tuple[str, str] = ("float32", "float32")
    centred: bool = False
    first_tokens: str | None = None
    first_held: int = 0
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class GroupHeader:
    """The layers with one window.

    Attributes:
        window: in tokens, or None.
        blocks: in the file.
        columns: of the block table.
        dropped_columns: columns in front that fell out of the window.
        skipped_columns: from the first to before the second never held anything.
    """

    window: int | None
    blocks: int
    columns: int
    dropped_columns: int = 0
    skipped_columns: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Header:
    """A cache.

    Attributes:
        kind: ``"growing"`` or ``"preallocated"``.
        model: the fingerprint of its config, or None if it was made of keys and values.
        options: arguments of `PagedInt8Cache`.
        length: tokens per sequence.
        batch_size: sequences, 0 without tokens.
        record_past: whether what falls out of a window is kept until the next ``crop``.
        first_tokens: whether there is a table of first tokens in full precision.
        groups: by name.
        layers: all of the model.
        library_version: that wrote the file.
        format_version: `FORMAT_VERSION` then.
    """

    kind: str
    model: dict[str, Any] | None
    options: dict[str, Any]
    length: int
    batch_size: int
    record_past: bool
    first_tokens: bool
    groups: dict[str, GroupHeader]
    layers: list[LayerHeader]
    library_version: str
    format_version: int = FORMAT_VERSION

    def as_metadata(self) -> dict[str, str]:
        """For `write_tensors`."""
        return {ENTRY: json.dumps(asdict(self), separators=(",", ":"))}


def read_header(file: TensorFile) -> Header:
    """The header of a file.

    Raises:
        CacheFileError: a value is missing, of another type or out of range, or the format is another release's.
    """
    if ENTRY not in file.metadata:
        raise file.error("header", f"it has no entry {ENTRY!r}; this is no file of PagedInt8Cache.save")
    try:
        values = json.loads(file.metadata[ENTRY])
    except (ValueError, RecursionError) as error:
        raise file.error(ENTRY, str(error)) from error
    fields = Fields(values, "", file.error)
    version = fields.integer("format_version", 1)
    library = fields.string("library_version")
    if version > FORMAT_VERSION:
        raise CacheFileMismatchError(
            f"{file.path}: format_version {version} was written by hf-int8-paged {library}; this release reads up to "
            f"{FORMAT_VERSION}: update hf-int8-paged"
        )
    length, batch = fields.integer("length", 0, _MOST), fields.integer("batch_size", 0, _MOST)
    if bool(length) != bool(batch):
        raise fields.refuse("batch_size", f"{batch} sequences of {length} tokens")
    options = _options(fields.inner("options"))
    of_groups = fields.inner("groups")
    columns = -(-length // options["block_size"])
    groups = {name: _group(of_groups.inner(name), columns) for name in of_groups.names()}
    stored = fields.elements("layers")
    layers = [_layer(Fields(x, f"layers[{i}]", file.error), groups, length) for i, x in enumerate(stored)]
    kind = fields.string("kind", (GROWING, PREALLOCATED))
    if kind == PREALLOCATED:
        for name, most in (("batch_size", options["max_batch_size"]), ("length", options["max_cache_len"])):
            fields.integer(name, 0, most)
    if (options["max_batch_size"] is not None) != (kind == PREALLOCATED):
        raise fields.refuse("kind", f"{kind} with max_batch_size={options['max_batch_size']}")
    model = None if fields.any("model") is None else {n: fields.inner("model").any(n) for n in fields.any("model")}
    return Header(
        kind, model, options, length, batch, fields.boolean("record_past"), fields.boolean("first_tokens"),
        groups, layers, library, version,
    )  # fmt: skip


def _options(fields: Fields) -> dict[str, Any]:
    options: dict[str, Any] = {
        "block_size": fields.integer("block_size", 16, 1 << 20),
        "rotation": fields.optional_string("rotation", ROTATIONS),
        "center_keys": fields.boolean("center_keys"),
        "format": fields.string("format", FORMATS),
        "sink_tokens": fields.integer("sink_tokens", 0, MAX_FIRST_TOKENS),
        "max_batch_size": fields.optional_integer("max_batch_size", 1, _MOST),
        "max_cache_len": fields.optional_integer("max_cache_len", 1, _MOST),
        "max_tokens": fields.optional_integer("max_tokens", 1),
    }
    if options["block_size"] % 16:
        raise fields.refuse("block_size", f"{options['block_size']} is no multiple of 16")
    if options["max_batch_size"] is not None and options["max_cache_len"] is None:
        raise fields.refuse("max_cache_len", "it is missing beside max_batch_size")
    return options


def _group(fields: Fields, columns: int) -> GroupHeader:
    skipped = fields.elements("skipped_columns", 2)
    if not all(type(x) is int and 0 <= x <= columns for x in skipped):
        raise fields.refuse("skipped_columns", f"{skipped} among {columns} columns")
    return GroupHeader(
        fields.optional_integer("window", 1),
        fields.integer("blocks", 0, _MOST),
        fields.integer("columns", columns, columns),
        fields.integer("dropped_columns", 0, columns),
        (skipped[0], skipped[1]),
    )


def _layer(fields: Fields, groups: dict[str, GroupHeader], length: int) -> LayerHeader:
    dtypes = fields.elements("dtypes", 2)
    if not all(dtype in ("float32", "float16", "bfloat16") for dtype in dtypes):
        raise fields.refuse("dtypes", f"{dtypes} are no dtypes of keys and values")
    group = fields.optional_string("group", groups)
    heads = fields.integer("num_kv_heads", 1 if length and group is not None else 0, 1 << 16)
    least = 1 if heads else 0
    state = fields.any("state")
    return LayerHeader(
        fields.string("class_name"),
        group,
        heads,
        fields.integer("head_dim", least, MAX_HEAD_DIM),
        fields.integer("v_head_dim", least, MAX_HEAD_DIM),
        fields.string("device"),
        (dtypes[0], dtypes[1]),
        fields.boolean("centred"),
        fields.optional_string("first_tokens", DTYPE_NAMES),
        fields.integer("first_held", 0, length),
        None if state is None else {name: fields.inner("state").any(name) for name in fields.inner("state").names()},
    )
