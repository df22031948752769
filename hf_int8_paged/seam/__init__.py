"""Between the cache and transformers' attention: the attention function, the mask function, lazy views, operators."""
