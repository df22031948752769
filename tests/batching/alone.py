"""What a request's tokens are when it is generated alone with `PagedInt8Cache`, in the same steps as in the batch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from eval._centred_pool import CentredPool
from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.batching import PagedInt8AttentionCache, PagedInt8BatchingManager
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from tests.processes import HANGS


class Life(NamedTuple):
    """A request from its first step to its end, or until the engine has thrown its blocks away and begins anew.

    Attributes:
        known: tokens that it began with: the prompt, and what was generated before.
        steps: positions at which its steps began.
    """

    known: int
    steps: list[int]


class Steps:
    """The steps in which a batch's requests were computed.

    A block that requests share was computed in the steps of the first that filled it.

    Args:
        cache: whose engine is watched from now on.
    """

    def __init__(self, cache: PagedInt8AttentionCache):
        self.lives: dict[str, list[Life]] = {}
        #: How often requests found a prefix in the blocks, lost their blocks, were forked; split prompts.
        self.shared = self.preempted = self.forked = self.split = 0
        self._page_size = next(iter(cache.cache_allocators.values())).tokens_per_page
        self._first: dict[tuple[int, ...], list[int]] = {}
        self._states: dict[str, Any] = {}
        self._extend, self._store = cache.extend_read_and_write_indices, cache.can_store_request_tokens
        cache.extend_read_and_write_indices = self._extended  # type: ignore[method-assign,assignment]
        cache.can_store_request_tokens = self._stored  # type: ignore[method-assign]

    def _stored(self, state: Any, request_len: int, dry_run: bool = False) -> bool:
        if self._states.get(state.request_id) is not state:
            self._states[state.request_id] = state
            known = len(state.initial_tokens)
            lives = self.lives.setdefault(state.request_id, [])
            self.preempted += bool(lives)
            if "__child#" in state.request_id and not lives:
                self.forked += 1
                lives.append(Life(known, list(self.lives[state.request_id.split("__child#")[0]][-1].steps)))
            else:
                lives.append(Life(known, []))
        return self._store(state, request_len, dry_run)

    def _extended(self, name: str, past: int, rows: int, *rest: Any) -> None:
        state, life = self._states[name], self.lives[name][-1]
        tokens = tuple(state.initial_tokens + state.generated_tokens)
        if past and not life.steps:
            self.shared += 1
            life.steps.extend(start for start in self._first[tokens[:past]] if start < past)
        life.steps[:] = [start for start in life.steps if start < past]
        life.steps.append(past)
        self.split += past + rows < life.known
        for full in range(self._page_size, past + rows + 1, self._page_size):
            self._first.setdefault(tokens[:full], [start for start in life.steps if start < full])
        self._extend(name, past, rows, *rest)


@torch.no_grad()
def logits_alone(
    model: PreTrainedModel, tokens: list[int], steps: list[int], manager: PagedInt8BatchingManager
) -> torch.Tensor:
    """Logits ``[tokens, vocabulary]`` of a sequence that a `PagedInt8Cache` with the manager's centres holds alone,
    computed in these steps."""
    assert model.config._attn_implementation == "int8_paged"
    options = manager._options
    pool = CentredPool(dict(options.centers), options.rotation)
    cache = PagedInt8Cache(model.config, pool=pool, sink_tokens=options.sink_tokens)
    logits = []
    for start, stop in zip(steps, [*steps[1:], len(tokens)]):
        ids = torch.tensor([tokens[start:stop]], device=model.device)
        logits.append(model(ids, use_cache=True, **{CACHE_ARGUMENT: cache}).logits[0].float())
    return torch.cat(logits)


class Difference(NamedTuple):
    """How a request's tokens differ from those that it gets alone.

    Attributes:
        margin: by how much a likelier token exceeds the generated one in logits, at most; 0 where greedy tokens are
            equal.
        logprob: by how much the generated tokens' log probabilities differ, at most.
    """

    margin: float
    logprob: float


def difference(
    model: PreTrainedModel,
    prompt: list[int],
    output: GenerationOutput,
    lives: list[Life],
    manager: PagedInt8BatchingManager,
) -> Difference:
    """Compare a request's result with the same steps of a `PagedInt8Cache` that holds it alone."""
    generated, margin, logprob = output.generated_tokens, 0.0, 0.0
    ends = [life.known - len(prompt) for life in lives[1:]] + [len(generated)]
    for life, stop in zip(lives, ends):
        start = life.known - len(prompt)
        if stop == start:
            continue
        logits = logits_alone(model, prompt + generated[: stop - 1], life.steps, manager)[life.known - 1 :]
        own = torch.tensor(generated[start:stop], device=logits.device)[:, None]
        margin = max(margin, float((logits.amax(dim=1) - logits.gather(1, own)[:, 0]).max()))
        expected = logits.log_softmax(dim=1).gather(1, own)[:, 0]
        logprob = max(logprob, float((expected - torch.tensor(output.logprobs[start:stop])).abs().max()))
    return Difference(margin, logprob)


def run(
    manager: PagedInt8BatchingManager, prompts: list[list[int]], *, cancelled: Collection[int] = (), per_prompt: int = 1
) -> tuple[dict[str, GenerationOutput], list[str]]:
    """Serve prompts until every result has come.

    Args:
        manager: with blocks, not started.
        prompts: token ids.
        cancelled: which of them are cancelled once the first result is there.
        per_prompt: results of each.

    Returns:
        Finished results by id, and the ids of the prompts.
    """
    results: dict[str, GenerationOutput] = {}
    manager.start()
    try:
        names = manager.add_requests(prompts)
        dropped = {names[i] for i in cancelled}
        awaited = {name + child for name in names if name not in dropped for child in children(per_prompt)}
        while awaited - set(results) and manager.is_running():
            result = manager.get_result(timeout=HANGS)
            assert result is not None
            assert result.error is None, result.error
            if not results:
                for name in dropped:
                    manager.cancel_request(name)
            if result.is_finished():
                results[result.request_id] = result
    finally:
        manager.stop(keep_for_next_session=True)
    assert awaited <= set(results)
    return results, names


def children(per_prompt: int) -> list[str]:
    """What the engine puts behind a request's id for each of its results."""
    return ["", *(f"__child#{i}" for i in range(per_prompt - 1))]


def check_nothing_is_held(cache: PagedInt8AttentionCache) -> None:
    """No request holds a block or a row: each is free, or kept for its content alone."""
    kept = 0
    for allocator in cache.cache_allocators.values():
        assert not allocator.block_table
        assert not allocator.ledger.shared_ref_counts
        kept += len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
    assert cache.compute_free_capacity(relative=False) + kept == cache.num_sectors * cache.bytes_per_sector
    assert cache.first_rows is None or not cache.first_rows._begins
