"""Models that keep no keys and values of earlier tokens, told by their config: encoders, and models of images."""

from __future__ import annotations

from typing import Any

from transformers.models.auto import modeling_auto

#: transformers' lists of models that generate, and of encoders that fill in masked words.
_GENERATING = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "VISION_2_SEQ",
    "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "CAUSAL_IMAGE_MODELING",
)  # fmt: skip
_MASKED = ("MASKED_LM",)


def keeps_no_cache(config: Any, decoder: Any) -> bool:
    """Whether no model of this config holds keys and values from one token to the next.

    Only of models that are transformers' own anything is known. Those that generate are in its lists; the configs of
    others that do, as parts of larger ones, say ``use_cache``. Some are encoders unless ``is_decoder`` says otherwise.

    Args:
        config: of the model.
        decoder: the part of it that describes the layers.
    """
    if not all(type(x).__module__.startswith("transformers.models.") for x in (config, decoder)):
        return False
    types = {config.model_type, decoder.model_type}
    if not types & _listed(_GENERATING):
        return not hasattr(decoder, "use_cache")
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    return not encoder_decoder and getattr(decoder, "is_decoder", None) is False and bool(types & _listed(_MASKED))


def _listed(tasks: tuple[str, ...]) -> set[str]:
    """Model types in transformers' lists for these tasks; each release has some of them."""
    return {name for task in tasks for name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})}
