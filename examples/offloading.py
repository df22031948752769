"""How much memory a long context takes, with and without offloading: `offloading.py [model] [picture] [tokens]`.

The same text is read three times, chunk by chunk: with all layers in memory, with all of them offloaded, and with the
first third of them in memory. The picture shows what of their blocks is in the process' memory over the context, and,
while one token passes from layer to layer, of which layers. Linux only, as it reads /proc/self/pagemap;
`pip install 'hf-int8-paged[examples]'` brings what it needs.
"""

import sys
from mmap import PAGESIZE
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.tools.demo import default_prompt
from hf_int8_paged.tools.demo_model import demo_model_folder

CHUNK, NEW_TOKENS = 256, 32


def resident_by_layer(cache):
    """Bytes of each layer's blocks that are in the process' memory; asking brings no layer near."""
    found = [0] * len(cache.layers)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for layer in range(len(found)):
            for x in (x for segment in cache.pool.look_at(layer).segments for x in segment):
                pages = range(x.data_ptr() // PAGESIZE, -(-(x.data_ptr() + x.nbytes) // PAGESIZE))
                pagemap.seek(8 * pages.start)  # eight bytes for each page; the highest bit says that it is there
                there = torch.frombuffer(bytearray(pagemap.read(8 * len(pages))), dtype=torch.int64) < 0
                found[layer] += min(int(there.sum()) * PAGESIZE, x.nbytes)
    return found


@torch.no_grad()
def read(model, ids, **options):
    """Feed a text in chunks and let the model go on: the cache, resident MiB after each chunk, tokens, layers seen."""
    cache, resident, tokens, seen = PagedInt8Cache(model.config, **options), [], [], []
    for chunk in ids.split(CHUNK, dim=1):
        # `cache=cache`, which transformers before 5.24 calls `past_key_values=cache`.
        logits = model(chunk, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits
        resident.append((int(cache.get_seq_length()), sum(resident_by_layer(cache)) / 2**20))
    for number in range(NEW_TOKENS):
        tokens.append(int(logits[0, -1].argmax()))
        hooks = []
        if number == NEW_TOKENS - 1:  # look at the last token on its way through the layers
            look = lambda *_: seen.append(resident_by_layer(cache))  # noqa: E731
            hooks = [layer.register_forward_hook(look) for layer in model.model.layers]
        logits = model(torch.tensor([tokens[-1:]]), **{CACHE_ARGUMENT: cache}).logits
        for hook in hooks:
            hook.remove()
    return cache, resident, tokens, seen


# A name on the hub, or a folder; without one SmolLM2-135M-Instruct, which needs no hub.
name = sys.argv[1] if len(sys.argv) > 1 else demo_model_folder()
picture = Path(sys.argv[2] if len(sys.argv) > 2 else "offloading.png")
count = int(sys.argv[3]) if len(sys.argv) > 3 else 2000
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="int8_paged")
text = tokenizer(default_prompt(), return_tensors="pt").input_ids
ids = text.repeat(1, -(-count // text.shape[1]))[:, :count]

third = model.config.num_hidden_layers // 3
kinds = {
    "all layers in memory": {},
    f"offloading=True, resident_layers={third}": {"offloading": True, "resident_layers": third},
    "offloading=True": {"offloading": True},
}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
said = None
for (label, options), color in zip(kinds.items(), ("tab:gray", "tab:green", "tab:blue")):
    cache, resident, tokens, seen = read(model, ids, **options)
    said = said or tokens
    assert tokens == said, "offloading changes no token"
    print(f"{label}: {resident[-1][1]:.1f} MiB of {cache.nbytes_allocated / 2**20:.1f} MiB in memory")
    left.plot(*zip(*resident), color=color, label=label)
    left.annotate(f"{resident[-1][1]:.1f} MiB", resident[-1], (-4, 5), textcoords="offset points", ha="right")
print(cache.describe())
print(f"all three went on alike: {tokenizer.decode(said)!r}")

left.set(xlabel="tokens in context", ylabel="MiB of blocks in the process' memory", title="one text, three times")
left.set_ylim(0, 1.12 * left.get_ylim()[1])
left.legend(loc="upper left", frameon=False)
image = right.imshow(torch.tensor(seen).T / 2**20, origin="lower", cmap="Blues", aspect="auto", vmin=0)
figure.colorbar(image, label="MiB of the layer's blocks in memory")
right.set(xlabel="the token has passed layer", ylabel="layer", title="offloading=True: one token on its way")
figure.savefig(picture, dpi=150)
print(f"the picture: {picture}")
