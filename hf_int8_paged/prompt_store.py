"""Prompts in a folder: what one request has computed, the next ones begin with, in this process or in another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .cache import PagedInt8Cache
from .options import checked_bytes
from .persistence.prompt_index import Entry, PromptIndex, add, evict
from .persistence.prompt_keys import PrefixHashes, model_key, token_ids
from .persistence.tensor_file import CacheFileError, CacheFileMismatchError
from .pool import PagedInt8Pool
from .sequences.growing import GrowingSequences

_ENDING = ".safetensors"


class PromptStore:
    """A folder of caches, each found by the tokens that it begins with.

    A prompt is cut into blocks of tokens, and the hash of each block covers all before it and the model. So a prompt
    finds what any other has stored of their common beginning, whole blocks of it; a model with windows or recurrent
    states, which cannot go back to a shorter prompt, finds prompts that were stored whole.

    Several processes and threads may use one folder: an SQLite database is the index, files are written beside it and
    renamed. A process that is killed at any moment leaves a store that works.

    Args:
        folder: where the files are; made if need be.
        max_bytes: most bytes of all files: a number, or a text such as ``"20GiB"``. Beyond it those that were used
            longest ago are deleted. ``None`` sets no limit.
        options: of the caches that `get` makes where it finds nothing: those of `PagedInt8Cache`. What it finds takes
            from them ``backend``, ``max_bytes`` and what is about offloading; the rest is as it was stored.

    Example:

    ```python
    store = PromptStore("prompts", max_bytes="20GiB")
    cache, known = store.get(model, ids)  # known: how many of the ids need not be computed any more
    output = model.generate(ids, cache=cache, max_new_tokens=40)
    store.put(cache, output)
    ```
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int | str | None = None, **options: Any):
        if options.get("max_batch_size") is not None:
            raise ValueError("a prompt store holds caches that grow; leave out max_batch_size")
        self.folder = Path(folder)
        self.max_bytes = checked_bytes("max_bytes", max_bytes)
        self._options = options
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index = PromptIndex(self.folder / "index.sqlite")

    def get(
        self, model: torch.nn.Module, ids: torch.Tensor | Sequence[int], pool: PagedInt8Pool | None = None
    ) -> tuple[PagedInt8Cache, int]:
        """A cache that holds the longest stored prefix of a prompt, and how long that is.

        It is shorter than the prompt, whose last token at least is the model's to compute. With nothing stored it is an
        empty cache, and 0. A file that this process cannot take is passed over: one of a newer release, or one whose
        keys are centred otherwise than the pool's. A damaged one is deleted.

        Args:
            model: that computes the rest.
            ids: ``[tokens]`` or ``[1, tokens]``.
            pool: take blocks from this pool.

        Raises:
            CacheFullError: the pool's limit is reached.
        """
        key, numbers = model_key(model), token_ids(ids)
        config: Any = model.config
        fresh = PagedInt8Cache(config, pool=pool, **self._options)
        hashes = PrefixHashes(_stored_as(key, fresh), numbers, fresh.pool.block_size)
        most = len(numbers)
        lengths = {*range(fresh.pool.block_size, most, fresh.pool.block_size), *self._index.lengths(most)}
        devices = {parameter.device for parameter in model.parameters()}
        device = devices.pop() if len(devices) == 1 else None  # of several, each layer goes where it was
        for entry in self._index.find({hashes.of(tokens): tokens for tokens in lengths}):
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
            cache._prompt_key = key
            return cache, length
        fresh._prompt_key = key
        return fresh, 0

    def put(
        self, cache: PagedInt8Cache, ids: torch.Tensor | Sequence[int], model: torch.nn.Module | None = None
    ) -> None:
        """Store a cache under the tokens that it holds, unless it is stored already.

        Args:
            cache: of one sequence without padding, with the first of the ids: one that `get` has returned, or any.
            ids: ``[tokens]`` or ``[1, tokens]``, at least as many as the cache holds; those behind are not looked at.
            model: that computed it. To be given unless `get` has returned the cache.

        Raises:
            ValueError: the cache is preallocated, empty, of several sequences or longer than the ids, no model is
                known, or the file alone is larger than ``max_bytes``.
            OSError: the folder cannot be written to.
        """
        numbers, length = token_ids(ids), int(cache.get_seq_length())
        key = model_key(model) if model is not None else cache._prompt_key
        if key is None:
            raise ValueError("which model computed the cache is not known; give it: put(cache, ids, model)")
        if not isinstance(cache._sequences, GrowingSequences):
            raise ValueError("a preallocated cache is not stored; make one without max_batch_size")
        if cache._batch != 1 or not 0 < length <= len(numbers):
            raise ValueError(
                f"the cache holds {cache._batch or 0} sequences of {length} tokens; a prompt is one sequence with the "
                f"first of the {len(numbers)} ids"
            )
        size = cache.pool.block_size
        hashes = PrefixHashes(_stored_as(key, cache), numbers[:length], size)
        entry = Entry(hashes.of(length) + _ENDING, length, length)
        if entry.name in self._index.sizes():
            return self._index.touch(entry.name)
        windows = any(group.window is not None for group in cache._sequences.groups.values())
        croppable = not windows and not cache._own_layers()
        lengths = {*range(size, length, size), length} if croppable else {length}
        with self._index.writing() as database:
            self._delete_strangers({name for (name,) in database.execute("SELECT name FROM entries")})
            path = self.folder / entry.name
            cache.save(path)
            written = path.stat().st_size
            if self.max_bytes is not None and written > self.max_bytes:
                path.unlink()
                raise ValueError(f"the prompt takes {written} bytes, more than max_bytes={self.max_bytes} of the store")
            add(database, entry, written, croppable, {hashes.of(tokens): tokens for tokens in lengths})
            if self.max_bytes is not None:
                for name in evict(database, self.max_bytes, entry.name):
                    (self.folder / name).unlink(missing_ok=True)

    def __len__(self) -> int:
        """Prompts in the store."""
        return len(self._index.sizes())

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self._index.sizes().values())

    def clear(self) -> None:
        """Delete all prompts."""
        with self._index.writing() as database:
            database.execute("DELETE FROM entries")
            self._delete_strangers(set())

    def _load(
        self, entry: Entry, config: Any, like: PagedInt8Cache, pool: PagedInt8Pool | None, device: torch.device | None
    ) -> PagedInt8Cache | None:
        """The cache of an entry, or None if it cannot be had: evicted meanwhile, damaged, or of another kind."""
        path = self.folder / entry.name
        if like.pool.offloaded is not None:
            pool = like.pool
        limits: dict[str, Any] = (
            {} if pool is not None else {"backend": like.pool.backend, "max_bytes": like.pool.max_bytes}
        )
        try:
            return PagedInt8Cache.load(path, config, pool, device=device, **limits)
        except CacheFileMismatchError:
            return None  # another process, machine or release may take it
        except CacheFileError:
            with self._index.writing() as database:
                database.execute("DELETE FROM entries WHERE name = ?", (entry.name,))
                path.unlink(missing_ok=True)
            return None

    def _delete_strangers(self, known: set[str]) -> None:
        """Delete files that no entry names: left by a process that was killed between a file and its entry."""
        for path in self.folder.glob(f"*{_ENDING}"):
            if path.name not in known:
                path.unlink(missing_ok=True)


def _stored_as(key: str, cache: PagedInt8Cache) -> str:
    """The key of a model and of how this cache stores its rows."""
    pool = cache.pool
    how = (pool.block_size, pool.rotation, pool.center_keys, pool.format, cache._sequences.sink_tokens)
    return f"{key} {how}"
