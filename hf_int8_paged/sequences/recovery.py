"""How the sequences of a growing cache get back to a complete state after an exception, wherever it came."""

from __future__ import annotations

from ..layer_checks import refuse_broken
from ..pool import PagedInt8Pool
from ..pool_access import Books, Writer
from ..pool_centring import Centring
from .group import Group
from .state import SequenceState


class SequenceRecovery:
    """The half of `GrowingSequences` that undoes what an exception has ended. It sets these attributes."""

    pool: PagedInt8Pool
    writer: Writer
    groups: dict[str, Group]
    books: Books
    #: The pool's turn in which `select`, `truncate` or `clear` last changed the state.
    _turn: int

    def truncate(self, length: int, *, keep_recorded: bool = False) -> None:
        """Forget all tokens from position ``length`` on."""
        raise NotImplementedError

    @property
    def broken(self) -> str | None:
        """Name of an operation that was interrupted and could not be undone, or None."""
        return self.books.state.broken

    @broken.setter
    def broken(self, operation: str | None) -> None:
        self.books.state = self.books.state._replace(broken=operation)

    def refuse_if_broken(self) -> None:
        """Raise ``RuntimeError`` if an operation was interrupted and could not be undone."""
        refuse_broken(self.books.state.broken)

    def checkpoint(self) -> SequenceState:
        """What `restore` needs to undo an operation."""
        return self.books.state

    def restore(self, before: SequenceState, operation: str, *, can_undo: bool = True) -> None:
        """Undo an operation that an exception ended: go back to a `checkpoint`.

        Blocks that the operation has given back are taken again. If somebody else was at the pool in the meantime, they
        may be another cache's; then nothing but `clear` helps.

        Args:
            before: the state before the operation.
            operation: its name, for messages.
            can_undo: whether all that it has changed are sequences; False for a cache with layers of other kinds.
        """
        if self.books.state.tables is before.tables:
            self.books.state = before
            return
        with self.pool.access.exclusive():
            for group in self.groups.values():
                group.epoch += 1
            if can_undo and self.pool.access.turn == self._turn + 1:
                self.books.state = before
            else:
                self.broken = operation
            self.pool.access.count_anew()

    def take_back(self, length: int | None = None) -> None:
        """Take back what some layers have stored of a step that an exception ended.

        Args:
            length: tokens to go back to, those before the step; ``None`` for where the newest step starts.
        """
        state, self.writer.thread = self.books.state, None
        length = state.step_start if length is None else length
        if length < state.length:
            self._undo_centrings()
            self.truncate(length, keep_recorded=True)

    def _undo_centrings(self) -> None:
        for index, centring in self.books.state.centrings.items():
            if not self._undo_centring(index, centring):
                self.broken = "a step"

    def _undo_centring(self, index: int, centring: Centring) -> bool:
        group = self.groups[centring.group]
        return self.pool.undo_centring(index, centring, lambda: group.holds_the_pool)
