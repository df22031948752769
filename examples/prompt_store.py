"""Two questions about one text, of which the second finds the text computed: `prompt_store.py [model] [folder]`.

Run it twice: the second time both find it, in another process. Then four answers are drawn from one prompt, and
`blocks.png` shows whose the blocks of the cache are. `pip install 'hf-int8-paged[examples]'` brings what it needs.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_int8_paged import PagedInt8Cache, PromptStore
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.tools.demo import QUESTION, default_prompt
from hf_int8_paged.tools.demo_model import demo_model_folder

# A name on the hub, or a folder; without one SmolLM2-135M-Instruct, which needs no hub.
name = sys.argv[1] if len(sys.argv) > 1 else demo_model_folder()
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "stored-prompts")
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="int8_paged")
store = PromptStore(folder, max_bytes="2GiB")

for question in ("What turned the lens of a lighthouse?", "What did the keeper write down?"):
    message = {"role": "user", "content": default_prompt().replace(QUESTION, question)}
    inputs = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = inputs["input_ids"]
    cache, known = store.get(model, ids)
    # `cache=cache`, which transformers before 5.24 calls `past_key_values=cache`.
    output = model.generate(ids, **{CACHE_ARGUMENT: cache}, max_new_tokens=32, do_sample=False)
    store.put(cache, output)
    print(f"{question} {known} of {ids.shape[1]} tokens were stored")
    print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True), "\n")

torch.manual_seed(0)
cache = PagedInt8Cache(model.config, max_bytes="1GiB")
model.generate(ids, **{CACHE_ARGUMENT: cache}, max_new_tokens=60, do_sample=True, num_return_sequences=4)
print(cache.describe())
cache.plot().savefig(folder / "blocks.png", dpi=150)
print(f"\n{len(store)} prompts in {store.nbytes:,} bytes; the blocks of four answers: {folder / 'blocks.png'}")
