"""Prompts in a folder: what one request has computed, the next ones begin with, in this process or in another."""

from __future__ import annotations

import contextlib
import inspect
import os
import sqlite3
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import EncoderDecoderCache

from .cache import PagedInt8Cache
from .options import checked_bytes
from .persistence.prompt_folder import ENDING, absolute_folder, delete_unknown
from .persistence.prompt_index import Entry, PromptIndex, add, evict
from .persistence.prompt_inputs import check_one_prompt
from .persistence.prompt_keys import Origin, token_ids
from .persistence.saving import as_tensors
from .persistence.tensor_file import CacheFileError, CacheFileMismatchError
from .pool import PagedInt8Pool
from .version import __version__


class PromptStore:
    """A folder of caches, each found by the tokens that it begins with.

    A prompt is cut into blocks of tokens, and the hash of each block covers all before it and the model. So a prompt
    finds what any other has stored of their common beginning, whole blocks of it; a model with windows or recurrent
    states, which cannot go back to a shorter prompt, finds prompts that were stored whole. So does one whose positions
    are turned otherwise beyond some length (``"dynamic"`` and ``"longrope"`` RoPE), beyond that length.

    A model is known by its config, some elements of every parameter and buffer, and the adapters that are active.
    ``extra_key`` is for what neither that nor the ids say: a picture, an encoder's input, weights that were changed in
    a few places. Where a config tells that ids leave something unsaid, a prompt without it is refused.

    Several processes and threads may use one folder: an SQLite database is the index, files are written beside it and
    renamed. A process that is killed at any moment leaves a store that works. What somebody else deletes or damages is
    no longer stored, and files that are not the store's stay.

    Args:
        folder: where the files are; made if need be.
        max_bytes: most bytes of all files of prompts, without the index: a number, or a text such as ``"20GiB"``.
            Beyond it those that were used longest ago are deleted, also when a store with a smaller limit is made.
            ``None`` sets no limit.
        cache_max_bytes: ``max_bytes`` of each cache that `get` returns without a pool.
        options: of the caches that `get` makes where it finds nothing: those of `PagedInt8Cache`. What it finds takes
            from them ``backend`` and what is about offloading; the rest is as it was stored.

    Raises:
        TypeError, ValueError: an option is unknown, of the wrong kind or out of range.
        OSError: the folder or its index cannot be made or read.

    Example:

    ```python
    store = PromptStore("prompts", max_bytes="20GiB")
    cache, known = store.get(model, ids)  # known: how many of the ids need not be computed any more
    output = model.generate(ids, cache=cache, max_new_tokens=40)
    store.put(cache, output)
    ```
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        max_bytes: int | str | None = None,
        *,
        cache_max_bytes: int | str | None = None,
        **options: Any,
    ):
        self.folder = absolute_folder(folder)
        self.max_bytes = checked_bytes("max_bytes", max_bytes)
        self._options = _checked(options)
        self._cache_max_bytes = checked_bytes("cache_max_bytes", cache_max_bytes)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index = PromptIndex(self.folder / "index.sqlite")
        self._keep_limit()

    def get(
        self,
        model: torch.nn.Module,
        ids: torch.Tensor | Sequence[int],
        pool: PagedInt8Pool | None = None,
        *,
        extra_key: str | None = None,
    ) -> tuple[PagedInt8Cache, int]:
        """A cache that holds the longest stored prefix of a prompt, and how long that is.

        It is shorter than the prompt, whose last token at least is the model's to compute. With nothing stored it is an
        empty cache, and 0. A file that this process cannot take is passed over: one of a newer release, or one whose
        keys are centred otherwise than the pool's. A damaged one is deleted.

        Args:
            model: that computes the rest.
            ids: ``[tokens]`` or ``[1, tokens]``, without padding.
            pool: take blocks from this pool.
            extra_key: names what neither model nor ids say; only prompts that were stored under the same are found. To
                be given where ids stand for pictures, sounds or films, where the model has an encoder, and where
                weights are elsewhere (on ``meta``, as accelerate offloads them). A prefix never ends within a picture.

        Raises:
            CacheFullError: the pool's limit is reached.
            TypeError, ValueError: an argument is of the wrong kind, or the ids need ``extra_key``.
            OSError: the folder or its index cannot be read.
        """
        origin, numbers = Origin.of(model, extra_key), token_ids(ids)
        origin.check(numbers)
        config: Any = model.config
        fresh = self._fresh(config, pool)
        hashes, most = origin.hashes(numbers, fresh), len(numbers)
        lengths = {*range(fresh.pool.block_size, most, fresh.pool.block_size), *self._index.lengths(most)}
        devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
        device = devices.pop() if len(devices) == 1 else None  # of several, each layer goes where it was
        for entry in self._index.find({hashes.of(tokens): tokens for tokens in origin.findable(lengths, numbers)}):
            cache = self._load(entry, config, fresh, pool, device)
            if cache is None:
                continue
            length = min(entry.shared, most - 1)
            if length < entry.tokens:
                try:
                    cache.crop(length - entry.tokens)
                except (RuntimeError, NotImplementedError):  # a window or a state that cannot go back
                    continue
            self._index.touch(entry.name)
            cache._prompt_key = origin
            return cache, length
        fresh._prompt_key = origin
        return fresh, 0

    def put(
        self,
        cache: PagedInt8Cache,
        ids: torch.Tensor | Sequence[int],
        model: torch.nn.Module | None = None,
        *,
        extra_key: str | None = None,
    ) -> None:
        """Store a cache under the tokens that it holds, unless it is stored already.

        Args:
            cache: of one sequence without padding, with the first of the ids: one that `get` has returned, or any.
            ids: ``[tokens]`` or ``[1, tokens]``, at least as many as the cache holds; those behind are not looked at.
            model: that computed it. To be given unless `get` has returned the cache, and it was not emptied since.
            extra_key: as in `get`; ``None`` takes what `get` was given for this cache.

        Raises:
            ValueError: the cache is preallocated, empty, padded as far as it knows, of several sequences or longer than
                the ids, no model is known, the ids need ``extra_key``, or the file alone is larger than ``max_bytes``.
            TypeError: an argument is of the wrong kind.
            OSError: the folder or its index cannot be written to. The prompt is not stored then.
        """
        if not isinstance(cache, PagedInt8Cache):
            inside = isinstance(cache, EncoderDecoderCache)
            what = "give its self_attention_cache" if inside else "make one with PagedInt8Cache(model.config)"
            raise TypeError(f"a prompt store takes a PagedInt8Cache, and got a {type(cache).__name__}; {what}")
        numbers, length = token_ids(ids), int(cache.get_seq_length())
        origin: Origin | None = cache._prompt_key
        if extra_key is None and origin is not None:
            extra_key = origin.extra
        if model is not None:
            origin = Origin.of(model, extra_key)
        elif origin is None:
            raise ValueError("which model computed the cache is not known; give it: put(cache, ids, model)")
        origin = origin.named(extra_key)
        sequences = cache._sequences
        check_one_prompt(sequences, length, len(numbers))
        numbers = numbers[:length]
        origin.check(numbers)
        hashes = origin.hashes(numbers, cache)
        entry = Entry(hashes.of(length) + ENDING, length, length)
        if entry.name in self._index.sizes() and (self.folder / entry.name).exists():
            self._index.touch(entry.name)
            return self._keep_limit(entry.name)
        if self.max_bytes is not None:
            self._check_size(sum(stored.nbytes for stored in as_tensors(cache, None, __version__)[1].values()))
        croppable = not cache._own_layers() and all(group.window is None for group in sequences.groups.values())
        if origin.limit is not None and length > origin.limit:
            croppable = False
        lengths = {*range(hashes.block_size, length, hashes.block_size), length} if croppable else {length}
        self._index.write(
            partial(self._write, cache, entry, croppable, {hashes.of(tokens): tokens for tokens in lengths})
        )

    def __len__(self) -> int:
        """Prompts in the store."""
        return len(self._index.sizes())

    @property
    def nbytes(self) -> int:
        """Bytes of all files of prompts; the index comes on top."""
        return sum(self._index.sizes().values())

    def clear(self) -> None:
        """Delete all prompts.

        Raises:
            OSError: the folder or its index cannot be written to.
        """

        def work(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM entries")
            delete_unknown(self.folder, ())

        self._index.write(work)

    def _fresh(self, config: Any, pool: PagedInt8Pool | None) -> PagedInt8Cache:
        """An empty cache with the store's options."""
        if pool is None:
            return PagedInt8Cache(config, max_bytes=self._cache_max_bytes, **self._options)
        try:
            return PagedInt8Cache(config, pool=pool, **self._options)
        except ValueError as error:
            given = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
            raise ValueError(
                f"the store was made with {given}, and get(pool=...) cannot honour that: {error}"
            ) from error

    def _load(
        self, entry: Entry, config: Any, like: PagedInt8Cache, pool: PagedInt8Pool | None, device: torch.device | None
    ) -> PagedInt8Cache | None:
        """The cache of an entry, or None if it cannot be had: evicted meanwhile, damaged, or of another kind."""
        if like.pool.offloaded is not None:
            pool = like.pool
        limits: dict[str, Any] = (
            {} if pool is not None else {"backend": like.pool.backend, "max_bytes": like.pool.max_bytes}
        )
        try:
            cache: PagedInt8Cache | None = PagedInt8Cache.load(
                self.folder / entry.name, config, pool, device=device, **limits
            )
        except CacheFileMismatchError:
            return None  # another process, machine or release may take it
        except CacheFileError:
            cache = None
        if cache is None or int(cache.get_seq_length()) != entry.tokens:
            self._index.forget(entry.name)
            return None
        return cache

    def _write(
        self,
        cache: PagedInt8Cache,
        entry: Entry,
        croppable: bool,
        prefixes: dict[str, int],
        database: sqlite3.Connection,
    ) -> None:
        """Write a cache's file and its entry, inside `PromptIndex.write`."""
        delete_unknown(self.folder, {name for (name,) in database.execute("SELECT name FROM entries")})
        path = self.folder / entry.name
        cache.save(path)
        try:
            written = path.stat().st_size
            self._check_size(written)
            add(database, entry, written, croppable, prefixes)
            self._evict(database, entry.name)
            database.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise

    def _check_size(self, nbytes: int) -> None:
        if self.max_bytes is not None and nbytes > self.max_bytes:
            raise ValueError(f"the prompt takes {nbytes} bytes, more than max_bytes={self.max_bytes} of the store")

    def _keep_limit(self, but: str = "") -> None:
        """Delete prompts until the limit holds, all but one if need be."""
        if self.max_bytes is not None and self.nbytes > self.max_bytes:
            self._index.write(partial(self._evict, but=but))

    def _evict(self, database: sqlite3.Connection, but: str) -> None:
        if self.max_bytes is not None:
            for name in evict(database, self.max_bytes, but):
                with contextlib.suppress(OSError):  # it has no entry any more, so the next prompt deletes it
                    (self.folder / name).unlink()


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Options of caches, each of which a cache takes.

    Raises:
        TypeError, ValueError: one of them is unknown, another method's, of the wrong kind or out of range.
    """
    if options.get("max_batch_size") is not None:
        raise ValueError("a prompt store holds caches that grow; leave out max_batch_size")
    if "pool" in options:
        raise TypeError("the pool is chosen by call: get(model, ids, pool=...)")
    known = inspect.signature(PagedInt8Cache).parameters
    names = [name for name in known if name not in ("config", "pool", "max_bytes")]
    for name in options:
        if name not in names:
            raise TypeError(f"a prompt store has no option {name!r}; those of its caches are {', '.join(names)}")
    PagedInt8Cache((), **options)
    return options
