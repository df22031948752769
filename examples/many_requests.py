"""Many requests at once over int8 blocks: `python examples/many_requests.py [model]`, any causal language model.

Without a model it fetches one; `pip install 'hf-int8-paged[examples]'` brings what that needs.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from hf_int8_paged.batching import int8_batching
from hf_int8_paged.tools.demo_model import demo_model_folder

# A name on the hub, or a folder; without one SmolLM2-135M-Instruct, which needs no hub.
name = sys.argv[1] if len(sys.argv) > 1 else demo_model_folder()
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)

manual = "You are a patient guide to a museum of natural history. You answer in one sentence, and you never guess. " * 3
questions = ["How old is the Earth?", "What did trilobites eat?", "Why do birds have hollow bones?", "What is amber?"]
inputs = [tokenizer(f"{manual}\nQuestion: {question}\nAnswer:").input_ids for question in questions]

generation = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id)
# 2,048 tokens for all requests together, in blocks of 32; a step has at most 256 of them.
engine = ContinuousBatchingConfig(num_blocks=64, page_size=32, max_batch_tokens=256)

session = dict(generation_config=generation, continuous_batching_config=engine)
with int8_batching(model), model.continuous_batching_context_manager(**session) as manager:
    first = manager.add_request(inputs[0], streaming=True)
    for result in manager.request_id_iter(first):
        print(f"\r{tokenizer.decode(result.generated_tokens)!r}", end="")
    print()
    # The manual lies in blocks by now, and these requests begin behind it.
    waiting = dict(zip(manager.add_requests(inputs[1:]), questions[1:]))
    while waiting:
        result = manager.get_result(timeout=1)
        if result is not None:
            print(f"{waiting.pop(result.request_id)} {tokenizer.decode(result.generated_tokens)!r}")
    cache = manager.cache
    shared = sum(len(pages.ledger.hash_to_block) for pages in cache.cache_allocators.values())

print(f"\n{cache.nbytes:,} bytes; {shared} full blocks are kept for prompts that begin alike")
