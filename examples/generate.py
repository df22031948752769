"""Generate with a paged INT8 KV cache: `python examples/generate.py [model]`, any causal language model.

Without a model it fetches one; `pip install 'hf-int8-paged[examples]'` brings what that needs.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.tools.demo_model import demo_model_folder

# A name on the hub, or a folder; without one SmolLM2-135M-Instruct, which needs no hub.
name = sys.argv[1] if len(sys.argv) > 1 else demo_model_folder()
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="int8_paged")

prompt = "Light travels faster than sound. That is why you see a flash of lightning before"
inputs = tokenizer(prompt, return_tensors="pt")

cache = PagedInt8Cache(model.config)
# `cache=cache`, which transformers before 5.24 calls `past_key_values=cache`.
output = model.generate(**inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=48, do_sample=False)

print(tokenizer.decode(output[0], skip_special_tokens=True))
print(
    f"\n{cache.get_seq_length()} tokens in {cache.nbytes_used:,} bytes of blocks ({cache.nbytes_allocated:,} allocated)"
)
