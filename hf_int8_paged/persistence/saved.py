"""``save`` and ``load`` of a cache."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from ..full import refused_memory
from ..one_thread import whole
from ..options import PoolOptions, check_cache_options, check_device, checked_device, decoder_config
from ..pool import PagedInt8Pool
from ..version import __version__
from .fingerprint import difference, fingerprint
from .header import read_header
from .loading import fill
from .saving import as_tensors
from .tensor_file import CacheFileError, TensorFile, file_path, write_tensors

if TYPE_CHECKING:
    from typing_extensions import Self

#: Options of a cache that a pool decides.
_POOL_OPTIONS = ("block_size", "rotation", "center_keys", "format")


class SavedCaches:
    """The half of a cache that outlives the process."""

    #: Of the decoder; None of a cache that was made of keys and values.
    _config: PreTrainedConfig | None

    @whole
    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to one safetensors file: its blocks in use, each once and as they are, and all that it takes
        to go on from there. Copies at most a few megabytes in memory.

        A kill or a crash at any moment leaves the file that was there before, or the new one, complete. The cache does
        not change. Nobody else may use it meanwhile; other caches of its pool may be used.

        Args:
            path: of the file, in a folder that exists; what is there is replaced, and its permissions are kept.

        Raises:
            OSError: the file cannot be written. What was there before still is.
            ValueError: the last forward pass was interrupted.
            TypeError: a layer of transformers' own has a state that no file can hold.
        """
        model = None if self._config is None else fingerprint(self._config)
        header, tensors = as_tensors(self, model, __version__)
        write_tensors(file_path(path), header.as_metadata(), tensors)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: Any,
        pool: PagedInt8Pool | None = None,
        *,
        backend: str | None = None,
        max_bytes: int | str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """A cache with the tokens of a file, which goes on as the saved one would have.

        The file is mapped into memory and copied from there into blocks; nothing in it is executed.

        Args:
            path: of a file that `save` wrote, with whatever backend.
            config: of the model, which must be the one that filled the cache: its config is compared, its weights
                cannot be.
            pool: take blocks from this pool, whose options must be those of the file. Its limits count, the file's
                ``max_tokens`` does not.
            backend: of the kernels, if no pool is given; ``None`` takes the best one.
            max_bytes: limit of the new cache, if no pool is given.
            device: for all layers; ``None`` puts each where it was.

        Raises:
            CacheFileError: there is no such file, it is damaged, or it does not fit the config, the pool or this
                machine. A ``ValueError``, whose message names the field.
            CacheFullError: the pool's limit is reached, or memory was refused.
            TypeError, ValueError: an argument is of the wrong kind, or out of range.

        Where it raises, a pool holds the tokens that it held before and no others; what is allocated besides is free.
        """
        mine = decoder_config(config)
        chosen = _checked_arguments(pool, backend, max_bytes, device)
        file = TensorFile(file_path(path))
        header = read_header(file)
        if header.model is not None:
            differs = difference(header.model, fingerprint(mine))
            if differs is not None:
                raise file.mismatch("config", f"it was filled by another model: {differs}")
        options = dict(header.options)
        if pool is not None:
            for name in _POOL_OPTIONS:
                theirs = getattr(pool, name)
                if theirs != options[name]:
                    raise file.mismatch(f"options.{name}", f"{options[name]!r}, but the pool's is {theirs!r}")
                del options[name]
            del options["max_tokens"]

        def place(stored: str) -> torch.device:
            try:
                return chosen or checked_device(stored)
            except (TypeError, ValueError) as error:
                raise file.mismatch("device", f"{error}; load it with device=...") from error

        try:
            cache = cls(config, pool=pool, backend=backend, max_bytes=max_bytes, **options)  # type: ignore[call-arg]
        except (NotImplementedError, ValueError) as error:
            raise file.mismatch("options", str(error)) from error
        try:
            fill(cache, header, file, place)
        except BaseException as error:
            full = refused_memory(error)
            if full is not None:
                raise full from error
            raise
        return cache


def _checked_arguments(
    pool: Any, backend: str | None, max_bytes: int | str | None, device: torch.device | str | None
) -> torch.device | None:
    """The device, if these are arguments that a new cache would take: what a file is refused for is the file's."""
    if pool is not None and not isinstance(pool, PagedInt8Pool):
        raise TypeError(f"pool must be a PagedInt8Pool or None, got {pool!r}")
    own = PoolOptions(backend=backend, max_bytes=max_bytes).checked()
    check_cache_options(own, max_batch_size=None, max_cache_len=None, sink_tokens=0, pool_given=pool is not None)
    if backend is not None:
        check_device(device, backend, own.block_size)
    return None if device is None else checked_device(device)


__all__ = ["CacheFileError", "SavedCaches"]
