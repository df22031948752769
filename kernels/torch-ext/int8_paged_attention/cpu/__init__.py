"""The CPU backend (`backend`): C kernels in ``src``, which `library` loads and whose records `records` packs."""
