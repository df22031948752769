"""Names that other caches have and `PagedInt8Cache` has not: what that means, said where they are looked up."""

from __future__ import annotations

WRAP_IT = (
    "an encoder-decoder model keeps keys of the decoder and of the encoder in one EncoderDecoderCache; wrap it: "
    "EncoderDecoderCache(PagedInt8Cache(model.config), PagedInt8Cache(model.config))"
)
_NO_LEGACY = "transformers 5 has no tuples of keys and values any more; iterate over the cache instead"
#: Looked up in vain, these say more than that they do not exist. `hasattr` stays False, as transformers asks it.
ABSENT = {
    "self_attention_cache": WRAP_IT,
    "cross_attention_cache": WRAP_IT,
    "is_updated": WRAP_IT,
    "check_dynamic_cache": WRAP_IT,
    "pool": "everything is preallocated (max_batch_size), and each layer holds its own blocks",
    "get_max_cache_shape": "it is called get_max_length() now",
    "max_cache_len": "ask get_max_length()",
    "max_batch_size": "ask batch_size; a preallocated cache's layers have max_batch_size",
    "prefetch_stream": "layers are brought near by their pool, on a stream of its own",
    "only_non_sliding": "this cache was made without offloading=True",
    "to_legacy_cache": _NO_LEGACY,
    "from_legacy_cache": _NO_LEGACY,
    "key_cache": "the keys of layer i are cache.layers[i].keys",
    "value_cache": "the values of layer i are cache.layers[i].values",
}
_NOT_FLATTENED = (
    "a PagedInt8Cache cannot be flattened, exported or pickled: its layers share tables, lengths and memory, and each "
    "would get its own back. cache.save(path) and PagedInt8Cache.load(path, config) bring it to another process, "
    "copy.deepcopy(cache) makes another one in this process; to export a model, leave the cache out of its inputs"
)


class NotFlattened:
    """Refuses, with a sentence, to be taken apart into tensors and plain values: for `torch.export` and for pickle.

    Kept as the first attribute of a cache, whose layers share block tables or lengths. Each layer would get its own
    back, and those would not be the cache's.
    """

    __slots__ = ()

    @property
    def __dict__(self) -> dict:  # type: ignore[override]
        raise TypeError(_NOT_FLATTENED)

    def __reduce__(self) -> str:
        raise TypeError(_NOT_FLATTENED)
