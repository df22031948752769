"""The first token of every request in full precision.

What a model computes of the first token of a text depends on that token alone, as it sees no other. So a row is kept
for every token that a request begins with, and requests that begin alike share it: those with a common prefix, forks,
and all prompts of a model whose tokenizer puts one token before each text. Blocks need not know of it.
"""

from __future__ import annotations

import torch

from ..kernels import FirstTokens

#: Rows that are kept although no request needs them.
KEPT = 64


class FirstTokenRows:
    """Keys and values of first tokens, by token.

    Args:
        layers: indices of the attention layers.
        heads: KV heads.
        head_dim: width of keys and values.
        dtype: to keep them in.
        device: of the layers.
    """

    def __init__(self, layers: list[int], heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self._place = {layer: i for i, layer in enumerate(layers)}
        self._capacity = 1
        #: ``[2, layers, rows, num_kv_heads, 1, head_dim]``: keys and values.
        self._rows = torch.zeros(2, len(layers), 1, heads, 1, head_dim, dtype=dtype, device=device)
        #: Row of each token; the one that was needed last stands last.
        self._row_of: dict[int, int] = {}
        #: What each request begins with.
        self._begins: dict[str, int] = {}
        self._users: dict[int, int] = {}
        #: Tokens whose rows hold nothing yet, and those of them that the step at hand writes.
        self._unwritten: set[int] = set()
        self._being_written: set[int] = set()
        #: Tokens whose rows are written anew by the next request that computes them.
        self._outdated: set[int] = set()

    def __contains__(self, token: int) -> bool:
        """Whether there is a row of this token that a request may begin with although it does not compute it."""
        return token in self._row_of and token not in self._unwritten

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def hold(self, request: str, token: int) -> None:
        """Keep a row for what a request begins with until `release`."""
        if request in self._begins:
            return
        row = self._row_of.pop(token, None)
        if row is None:
            row = self._free_row()
            self._unwritten.add(token)
        self._row_of[token] = row
        self._begins[request] = token
        self._users[token] = self._users.get(token, 0) + 1

    def release(self, request: str) -> None:
        """The request needs its row no longer; unknown requests are none that had one."""
        token = self._begins.pop(request, None)
        if token is not None:
            self._users[token] -= 1
            if not self._users[token]:
                del self._users[token]

    def release_all(self) -> None:
        """No request needs a row. Rows that a step was to write and did not are forgotten."""
        self._begins.clear()
        self._users.clear()
        for token in self._unwritten:
            del self._row_of[token]
        self._outdated -= self._unwritten
        self._unwritten.clear()

    def outdate(self) -> None:
        """The model's weights may have changed. Rows serve the requests that have them, and those that find the blocks
        behind them; who computes a first token writes its row anew."""
        self._outdated.update(self._row_of)

    def forget_all(self) -> None:
        """Forget every row."""
        self._unwritten.update(self._row_of)
        self.release_all()

    def make_room(self) -> None:
        """Have memory for all rows. A step does it, as the one before may still be writing when requests come."""
        missing = self._capacity - self._rows.shape[2]
        if missing:
            shape = list(self._rows.shape)
            shape[2] = missing
            self._rows = torch.cat([self._rows, self._rows.new_zeros(shape)], dim=2)

    def rows(self, requests: list[str]) -> list[int]:
        """Row of each request."""
        return [self._row_of[self._begins[request]] for request in requests]

    def to_write(self, requests: list[str], past: list[int], starts: list[int]) -> tuple[list[int], list[int]]:
        """Rows that a step writes, and which of its packed tokens they are.

        Args:
            requests: of the step.
            past: tokens that each had before.
            starts: where its tokens begin.
        """
        found: dict[int, int] = {}
        for request, before, start in zip(requests, past, starts):
            token = self._begins[request]
            if before == 0 and (token in self._unwritten or token in self._outdated):
                found.setdefault(token, start)
        self._being_written = set(found)
        # Should a layer fail, the row is partly old and partly new.
        self._unwritten |= self._being_written
        return [self._row_of[token] for token in found], list(found.values())

    def written(self) -> None:
        """Every layer has written the rows of the step at hand."""
        self._unwritten -= self._being_written
        self._outdated -= self._being_written
        self._being_written = set()

    def write(self, layer: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write rows, int64 ``[count]``, of keys and values ``[count, num_kv_heads, head_dim]``, in place."""
        place = self._place[layer]
        for own, new in zip(self._rows[:, place], (keys, values)):
            own[rows, :, 0] = new.to(own.dtype)

    def of_layer(self, layer: int, places: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> FirstTokens:
        """What kernels take.

        Args:
            layer: index of the layer.
            places: row, first and stop of each sequence, int32 ``[batch]`` each. ``first`` is 0, and ``stop`` 1, or 0
                where the first token is the step's own and at hand.
        """
        keys, values = self._rows[:, self._place[layer]]
        return FirstTokens(keys, values, *places, 1)

    def _free_row(self) -> int:
        if len(self._row_of) >= max(KEPT, self._capacity):
            unused = next((token for token in self._row_of if token not in self._users), None)
            if unused is not None:
                self._unwritten.discard(unused)
                self._outdated.discard(unused)
                # The step at hand may be writing this row, which is another token's from now on.
                self._being_written.discard(unused)
                return self._row_of.pop(unused)
        free = set(range(self._capacity)) - set(self._row_of.values())
        if not free:
            self._capacity *= 2
            return self._capacity // 2
        return min(free)
