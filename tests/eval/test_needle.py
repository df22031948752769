"""`eval/needle.py`: where the key stands, and what is reported."""

from __future__ import annotations

import json
from pathlib import Path

import needle
import pytest
import torch
from transformers import AutoTokenizer

CHAT = "{% for m in messages %}<user> {{ m.content }} {% endfor %}<assistant> "


class Words:
    """One token per character; keeps what it is given."""

    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool = False, return_tensors: str | None = None):
        ids = [ord(c) for c in text]
        ids = [2, *ids] if add_special_tokens else ids
        return type("Encoding", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})

    def apply_chat_template(self, turns, **_: object) -> str:
        return f"<user>{turns[0]['content']}<end><assistant>"


@pytest.mark.parametrize("chat", [None, CHAT])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_context_and_question_have_the_length_and_the_key_its_depth(chat: str | None, depth: float) -> None:
    tokenizer = Words()
    tokenizer.chat_template = chat
    text = torch.full((70,), ord("~"))
    context, question = needle.haystack(text, tokenizer, "13579", 500, depth, 11)
    assert context.shape[1] + question.shape[1] == 500
    words = "".join(map(chr, context[0].tolist()))
    before = words[: words.index("\n\nThe pass key is 13579.")].count("~")
    assert before == pytest.approx(depth * words.count("~"), abs=1)
    asked = "".join(map(chr, question[0].tolist()))
    assert asked.endswith("The pass key is")
    assert words.startswith("<user>" if chat else "\x02Somewhere")


def test_a_context_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="20 tokens are too few"):
        needle.haystack(torch.zeros(5, dtype=torch.long), Words(), "13579", 20, 0.5, 0)


def test_every_point_is_measured_with_both_caches_and_drawn(
    model_folder, text_file, tmp_path: Path, run_script
) -> None:
    assert AutoTokenizer.from_pretrained(model_folder).chat_template is None
    run_script(
        needle, "--model", model_folder, "--text-file", text_file, "--device", "cpu", "--lengths", 60, 90,
        "--depths", 0, 0.5, 1, "--trials", 2, "--json", tmp_path / "needle.json", "--picture", tmp_path / "needle.png",
    )  # fmt: skip
    made = json.loads((tmp_path / "needle.json").read_text(encoding="utf-8"))
    points = {(r["tokens"], r["depth"], r["trial"]) for r in made["records"]}
    assert points == {(n, d, t) for n in (60, 90) for d in (0, 0.5, 1) for t in (0, 1)}
    # Words outside its vocabulary are one word to this tokenizer: no key can be found.
    assert made["summary"]["points"] == 12
    assert made["summary"]["found"] == {"dense": 0, "int8": 0}
    assert (tmp_path / "needle.png").stat().st_size > 10_000
