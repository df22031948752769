"""The ways to generate that transformers' own generation tests go through, each as one function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hf_int8_paged.cache_argument import CACHE_ARGUMENT

from .comparison import NEW_TOKENS, Result

#: Tokens of padding in front of the second sequence.
PADDING = 16


@dataclass(frozen=True)
class Mode:
    """One way to generate.

    Attributes:
        run: called with the model, its inputs and keyword arguments of `generate` for the first call.
        decoder_only: whether it makes no sense for encoder-decoder models.
        padded: whether the second sequence is shorter than the first.
        candidates: whether tokens are guessed and verified several at a time. Then how tokens are cut into passes
            depends on the guesses, and with it which of them attention sees in full precision.
        preallocated: whether the cache is preallocated and passed, and `StaticCache` is what it is compared with.
    """

    run: Callable[..., Result]
    decoder_only: bool = False
    padded: bool = False
    candidates: bool = False
    preallocated: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__ + ("_padded" if self.padded else "") + ("_preallocated" if self.preallocated else "")


def generate(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    torch.manual_seed(0)
    call: Any = model.generate
    settings = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "output_logits": True,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    return Result(call(**inputs, **settings | kwargs))


def greedy(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return generate(model, inputs, **kwargs)


def hidden_states(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return generate(model, inputs, output_hidden_states=True, **kwargs)


def attentions(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return generate(model, inputs, output_attentions=True, **kwargs)


def greedy_with_processors(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    processors = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[5, 4]]}
    return generate(model, inputs, remove_invalid_values=True, renormalize_logits=True, **processors, **kwargs)


def greedy_without_returned_dict(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    plain: Any = generate(model, inputs, return_dict_in_generate=False, **kwargs).output
    result = generate(model, inputs, **kwargs)
    assert torch.equal(plain, result.output.sequences)
    return result


def sample(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return generate(model, inputs, do_sample=True, top_k=10, top_p=0.9, temperature=0.7, **kwargs)


def sample_several(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return generate(model, inputs, do_sample=True, num_return_sequences=3, **kwargs)


def beam_search(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    result = generate(model, inputs, num_beams=3, num_return_sequences=2, **kwargs)
    result.in_rows = False
    return result


def beam_search_hidden_states(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return beam_search(model, inputs, output_hidden_states=True, early_stopping=True, **kwargs)


def beam_sample(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    # Nothing bends the distribution, so that a sequence's score is the mean of its tokens' log-probabilities.
    return beam_search(model, inputs, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, **kwargs)


def beam_search_from_embeddings(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    result = beam_search(model, _embedded(model, inputs), **kwargs)
    result.relation = beam_search(model, inputs)
    return result


def greedy_from_embeddings(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    result = generate(model, _embedded(model, inputs), **kwargs)
    result.relation = generate(model, inputs)
    return result


def ids_and_embeddings(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    embedded = _embedded(model, inputs)
    result = generate(model, embedded | {"input_ids": inputs["input_ids"]}, **kwargs)
    result.relation = generate(model, inputs)
    return result


def from_nothing(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return generate(model, {}, bos_token_id=1, **kwargs)


def in_chunks(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return generate(model, inputs, prefill_chunk_size=8, **kwargs)


def in_long_chunks(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return generate(model, inputs, prefill_chunk_size=18, **kwargs)


def all_logits_kept(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    result = generate(model, inputs | {"logits_to_keep": 0}, **kwargs)
    result.relation = generate(model, inputs)
    return result


def own_position_ids(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    positions = torch.arange(inputs["input_ids"].shape[1]).expand(len(inputs["input_ids"]), -1)
    result = generate(model, inputs | {"position_ids": positions}, **kwargs)
    result.relation = generate(model, inputs)
    return result


def streamed(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.flatten())

        def end(self) -> None:
            pass

    streamer = Streamer()
    result = generate(model, _first(inputs), streamer=streamer, **kwargs)
    assert torch.equal(torch.cat(streamer.seen), result.output.sequences[0])
    return result


def with_guidance(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return generate(model, inputs, guidance_scale=1.5, **kwargs)


def assisted(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return generate(model, _first(inputs), assistant_model=_assistant(model), **kwargs)


def assisted_sample(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    return assisted(model, inputs, do_sample=True, **kwargs)


def prompt_lookup(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    inputs = _first(inputs)
    own = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    # A prompt that repeats itself, or nothing would be found to look up.
    length = inputs[own].shape[1]
    inputs[own] = inputs[own][:, :5].repeat(1, length // 5 + 1)[:, :length]
    return generate(model, inputs, prompt_lookup_num_tokens=4, **kwargs)


def continued(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    """`generate` goes on from the cache that a first call returned."""
    first = generate(model, inputs, **kwargs | {"max_new_tokens": 3})
    result = _go_on(model, inputs, torch.arange(3), first.output.sequences, first.output[CACHE_ARGUMENT])
    at_once = generate(model, inputs, max_new_tokens=3 + NEW_TOKENS)
    at_once.output.logits = at_once.output.logits[3:]
    result.relation = at_once
    return result


def continued_after_reorder(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    """As `continued`, with the sequences in another order afterwards."""
    first = generate(model, inputs, **kwargs | {"max_new_tokens": 3})
    cache = first.output[CACHE_ARGUMENT]
    rows = torch.tensor([2, 1, 0])
    cache.reorder_cache(rows)
    return _go_on(model, inputs, rows, first.output.sequences, cache)


def continued_after_repeat(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> Result:
    """As `continued`, with every sequence doubled in between, and four of the six kept."""
    first = generate(model, inputs, **kwargs | {"max_new_tokens": 3})
    cache = first.output[CACHE_ARGUMENT]
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([0, 1, 3, 4])
    cache.batch_select_indices(rows)
    return _go_on(model, inputs, rows // 2, first.output.sequences, cache)


def _go_on(
    model: PreTrainedModel, inputs: dict[str, Any], rows: torch.Tensor, sequences: torch.Tensor, cache: Any
) -> Result:
    """`generate` for ``rows`` of ``sequences``, of which ``cache`` holds all but the newest token."""
    ids, sequences = inputs["input_ids"][rows], sequences[rows]
    # Without a mask, a token that was chosen would count as padding where it has the same id.
    mask = torch.ones_like(sequences)
    if not model.config.is_encoder_decoder:
        return generate(model, {"input_ids": sequences, "attention_mask": mask, CACHE_ARGUMENT: cache})
    decoders = {"decoder_input_ids": sequences, "decoder_attention_mask": mask}
    return generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE_ARGUMENT: cache} | decoders)


def _embedded(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    return embedded | {name: x for name, x in inputs.items() if name != "input_ids"}


def _first(inputs: dict[str, Any]) -> dict[str, Any]:
    """The first sequence alone; guessing takes one at a time."""
    return {name: x[:1] for name, x in inputs.items()}


def _assistant(model: PreTrainedModel) -> PreTrainedModel:
    """A model that guesses right at times and wrong at others."""
    assistant = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in assistant.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * parameter.std(correction=0) * noise)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


MODES = [
    Mode(greedy),
    Mode(greedy, padded=True),
    Mode(greedy, preallocated=True, decoder_only=True),
    Mode(greedy_with_processors),
    Mode(greedy_without_returned_dict),
    Mode(hidden_states),
    Mode(attentions),
    Mode(sample),
    Mode(sample_several),
    Mode(sample_several, preallocated=True, decoder_only=True),
    Mode(beam_search),
    Mode(beam_search, padded=True),
    Mode(beam_search, preallocated=True, decoder_only=True),
    Mode(beam_search_hidden_states),
    Mode(beam_sample),
    Mode(beam_search_from_embeddings, decoder_only=True),
    Mode(greedy_from_embeddings, decoder_only=True),
    Mode(ids_and_embeddings, decoder_only=True),
    Mode(from_nothing, decoder_only=True),
    Mode(in_chunks, decoder_only=True),
    Mode(in_long_chunks, decoder_only=True),
    Mode(all_logits_kept, decoder_only=True),
    Mode(own_position_ids, decoder_only=True),
    Mode(streamed, decoder_only=True),
    Mode(with_guidance, decoder_only=True),
    Mode(assisted, candidates=True),
    Mode(assisted_sample, candidates=True),
    Mode(prompt_lookup, candidates=True),
    Mode(continued),
    Mode(continued_after_reorder),
    Mode(continued_after_repeat),
]
