# %% [markdown] covers=["5-idea-1"]
# # Chapter 5: The LLaVA architecture
#
# You have built patches, features, a bridge, a splice and a loss. This chapter puts them together: one class that takes pixels and words and gives words. It loads trained weights and answers. Then you make it fast, and find out where the time goes.

# %% [markdown]
# **By the end you can**
#
# - write the whole model, and say what each part hands to the next;
# - write greedy decoding and a KV cache, and show that the cache changes nothing but the work;
# - move the weights to transformers and back;
# - tell from data sheets which latencies a GPU cannot reach;
# - say what the choice of a layer costs, from an experiment.

# %%
from vlm_course.build.costs import measured

print("Reading and doing: about 120 minutes.")
print(measured("05_llava"))

# %% [markdown]
# You need the idea of a causal mask (chapter 3) and of a chat template (chapter 4). Everything that you wrote there will be used here; where an answer of yours is missing, the package's steps in.

# %% locked="imports"
import time

import torch
from torch import Tensor, nn

from vlm_course import budget, chat, generation, gpu_times, trace
from vlm_course.attention import causal_mask, padding_mask
from vlm_course.bridges import VisionProjection
from vlm_course.catalog import models as catalog
from vlm_course.decoder import Decoder
from vlm_course.fusion import splice_image_features
from vlm_course.grading import check, part, question
from vlm_course.llava import LLAVA_7B, LLAVA_13B, LlavaConfig
from vlm_course.progress import predict, reveal
from vlm_course.simulations import figures
from vlm_course.vit import VisionTransformer

# %% [markdown]
# ## Predict first
#
# Three questions before anything runs. Choose an answer and say how sure you are; each is settled where it is measured.

# %%
predict("p_5_1", "LLaVA-1.5 13B on one A100 reads 626 tokens and then writes 100. At best, which takes longer?",
        {"a": "reading, about 6 times: there are 6 times as many tokens", "b": "about the same",
         "c": "writing, about 4 times", "d": "writing, over 20 times"})

# %%
predict("p_5_2", "The prompt gets one more word at its end. Which of the old tokens' keys, deep in the decoder, change?",
        {"a": "all of them: attention mixes everything", "b": "those of later layers", "c": "none"})

# %%
predict("p_5_3", "A fresh bridge and a fresh decoder learn from one layer of a frozen vision tower. Which layer's "
        "reader makes the fewest mistakes?",
        {"last": "the last", "penultimate": "the last but one", "third-from-last": "the third from the end",
         "first": "the output of the first block",
         "tie": "the last three differ by no more than one seed differs from another"})

# %% [markdown] covers=["5-idea-1"]
# ## Three parts, one of them new
#
# LLaVA is a vision tower, a bridge and a language model. Tower and language model existed before; only the bridge starts from nothing. The lesson describes the first version and the second at once. They differ in three places:

# %% covers=["5-idea-1"]
for name in ("LLaVA v1 13B", "LLaVA-1.5 7B", "LLaVA-1.5 13B"):
    row = catalog.by_name(name)
    print(f"{name:14s} bridge {row.bridge:7s} image {row.image_size} px   {row.visual_tokens} tokens   "
          f"{row.vision_width} -> {row.llm_width}")

# %% [markdown]
# A single linear map, 224 pixels and 256 tokens belong to version 1; two layers, 336 pixels and 576 tokens to 1.5. Put together as in the lesson they describe neither. And a 13B model is 5120 wide, not 4096. What each part weighs:

# %% covers=["5-idea-1", "5-idea-3"]
for name, config in (("7B", LLAVA_7B), ("13B", LLAVA_13B)):
    whole, text = budget.parameters(config), budget.decoder_parameters(config.text)
    tower = budget.vit_parameters(config.vision)
    bridge = whole - text - tower
    print(f"{name:4s} tower {tower:,}   language model {text:,}   new: {bridge:,}, {100 * bridge / whole:.2f} %")

# %% [markdown] covers=["5-walkthrough-1"]
# ## The architecture in shapes
#
# The 13B model, traced on PyTorch's *meta* device: every layer runs, no number is stored. One image and 50 words go in. Read from top to bottom; M counts visual tokens, T all tokens.

# %% covers=["5-walkthrough-1"]
rows = trace.trace_config(LLAVA_13B, text_tokens=50)
for row in rows:
    shape = " ".join(f"{axis}={size}" for axis, size in zip(row.axes, row.shape, strict=True))
    print(f"{row.stage:8s} {row.name:33s} {shape}")

# %% [markdown]
# Follow the 577: class token and patches, from the first block to the last that runs, number 23 of 24 (counted from 0: 22). The class token is dropped before the bridge. From there on everything is 5120 wide, but for the inside of the feed-forward layers.

# %% [markdown]
# The same in a terminal, for any model with a public architecture: `vlm-course trace llava-1.5-13b`.

# %% [markdown] covers=["5-walkthrough-2"]
# ## What the language model reads
#
# The lesson puts the image in front of the text. In LLaVA-1.5 it stands *inside* the first question, behind the system's words:

# %% covers=["5-walkthrough-2"]
prompt, _ = chat.vicuna_prompt([("What is in this image?", None)])
before, after = prompt.split("<image>")
print(prompt)
print(f"\nwords before the image: {len(before.split())}, behind it: {len(after.split())}")

# %% [markdown]
# A tokenizer makes about 50 tokens of such a prompt, by the lesson's count; `<image>` becomes 576. That is the input: one row of 626 vectors. How much of it is image, and what does it cost to keep?

# %% covers=["5-walkthrough-2", "5-idea-4"]
text, image = 50, LLAVA_13B.visual_tokens
print(f"{image} of {image + text} tokens are image: {100 * image / (image + text):.0f} %")
for name, config in (("7B", LLAVA_7B), ("13B", LLAVA_13B)):
    cache = budget.kv_cache_bytes(config, image + text)
    print(f"{name:4s} {config.text.layers} layers, {config.text.heads} heads, width {config.text.width}: "
          f"input {[image + text, config.text.width]}, keys and values {cache / 1e9:.2f} GB, "
          f"{cache / (image + text):,.0f} bytes a token")

# %% [markdown] covers=["5-idea-4"]
# So 92 % holds for one image and 50 words. Several images take more of the context window of 4,096 tokens, and soon all of it:

# %% covers=["5-idea-4"]
for images in (1, 2, 4, 6, 7, 8):
    tokens = 576 * images + 50
    fits = "fits" if tokens <= LLAVA_13B.text.max_positions else "does not fit"
    cache = budget.kv_cache_bytes(LLAVA_13B, tokens) / 1e9
    print(f"images: {images}   tokens: {tokens:5d}, {100 * 576 * images / tokens:.0f} % image   {cache:.2f} GB   {fits}")

# %% [markdown]
# This is why later models spend their effort on fewer tokens for an image. Now the small model that comes with the course: 144 tokens an image, a template of its own, otherwise the same class.

# %%
from vlm_course.pretrained import load_small
from vlm_course.probe_questions import question_set

small = load_small()
exam = question_set(small.tokenizer, scenes=8)
ids, _ = chat.encode_chat(small.tokenizer, [(exam.texts[0][0], None)], small.model.config.visual_tokens)
words = small.tokenizer.decode(ids, skip_special=False).replace("<image> " * 143, "<image> x 143, ")
print(words)
print(f"{ids.count(small.tokenizer.image_id)} of {len(ids)} tokens are image")

# %% [markdown]
# ## Two masks at once
#
# Questions differ in length. A batch is a rectangle, so shorter rows are filled up with padding, on the left when an answer is to be written on the right. Nobody may attend to padding, and nobody to the future. Two places of padding, three tokens:

# %%
real = torch.tensor([[False, False, True, True, True]])  # [B, T]
causal, padding = causal_mask(5), padding_mask(real)[0, 0].expand(5, 5)
print("causal       no padding   both")
for row in torch.stack([causal, padding, causal & padding], 1).int().tolist():
    print("    ".join(" ".join(".#"[value] for value in mask) for mask in row))

# %% [markdown]
# Rows ask, columns are asked, `#` may be seen. A frequent mistake replaces one mask by the other. It does not crash, it even trains, and its loss is wonderful, because every token sees the word that it has to predict. Catch it by changing the future:

# %%
ids = torch.tensor([ids])
changed = ids.clone()
changed[0, -2] = small.tokenizer.id_of("red")        # the last word of the question
everything = torch.ones_like(ids, dtype=torch.bool)  # no padding at all
for name, mask in (("both", padding_mask(everything) & causal_mask(ids.shape[1])), ("padding alone", padding_mask(everything))):
    one, other = (small.model.decoder(small.model.decoder.embed(x), mask=mask) for x in (ids, changed))
    moved = (one - other)[0, :-2].abs().amax()       # logits of all earlier positions
    print(f"{name:14s} earlier logits moved by {moved:.2f}")

# %% [markdown] covers=["5-walkthrough-1"]
# ## Build it
#
# ### Build It: the whole model  ·  medium  ·  about 25 minutes  ·  5 points
#
# Write `PlainLlava(config)` with the parts `vision`, `bridge` and `decoder`. `embed` makes what the decoder reads: patch features of the layer `config.feature_layer`, bridged, in place of the placeholders. `forward` returns logits for every position; with an `attention_mask` (True = real token) it must hide padding and future.
#
# <details><summary>Hint 1</summary>VisionTransformer(config.vision), VisionProjection(config.vision.width, config.text.width), Decoder(config.text).</details>
# <details><summary>Hint 2</summary>embed: self.vision.patch_features(pixels, layer=...), then the bridge, then splice_image_features(words, ids, visual, config.image_id), where words = self.decoder.embed(ids).</details>
# <details><summary>Hint 3</summary>Without an attention_mask return self.decoder(embeds), which is causal by itself. With one: mask=padding_mask(attention_mask) & causal_mask(ids.shape[1]).</details>

# %% exercise="plain_llava" twin="vlm_course.plain.PlainLlava" covers=["5-walkthrough-1"]
class PlainLlava(nn.Module):
    """Vision tower, MLP bridge, decoder. forward: ids [B, T] with expanded placeholders, pixels [images, 3, H, W] in
    the order of the placeholders, attention_mask [B, T] (True = real token; None: all are) -> logits [B, T, V].
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        ### BEGIN SOLUTION
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.bridge = VisionProjection(config.vision.width, config.text.width)
        self.decoder = Decoder(config.text)
        ### END SOLUTION

    def embed(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """What the decoder reads: ids [B, T], pixels [images, 3, H, W] -> [B, T, D_llm]."""
        ### BEGIN SOLUTION
        patches = self.vision.patch_features(pixels, layer=self.config.feature_layer)  # -> [images, N, D_vision]
        visual = self.bridge(patches)  # [images, N, D_vision] -> [images, N, D_llm]
        words = self.decoder.embed(ids)  # [B, T] -> [B, T, D_llm]
        return splice_image_features(words, ids, visual, self.config.image_id)  # -> [B, T, D_llm]
        ### END SOLUTION

    def forward(self, ids: Tensor, pixels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        ### BEGIN SOLUTION
        embeds = self.embed(ids, pixels)  # [B, T] -> [B, T, D_llm]
        if attention_mask is None:
            return self.decoder(embeds)  # causal by itself: [B, T, D_llm] -> [B, T, V]
        mask = padding_mask(attention_mask) & causal_mask(ids.shape[1], device=ids.device)  # [B, 1, T, T]
        return self.decoder(embeds, mask=mask)  # [B, T, D_llm] -> [B, T, V]
        ### END SOLUTION

# %% check="plain_llava" points=5 covers=["5-walkthrough-1"]
check("plain_llava", globals())

# %% [markdown]
# ### Weights for your class
#
# A class is a shape. Pour the trained numbers of the shipped model into yours; the names of the parts fit, so `load_state_dict` finds a place for each.

# %%
PlainLlava = part("PlainLlava", globals())
model = PlainLlava(small.model.config)
print(model.load_state_dict(small.model.state_dict()))
model = model.eval().requires_grad_(False)
print(f"{sum(p.numel() for p in model.parameters()):,} trained numbers")

# %%
logits = model(ids, exam.pixels[:1])               # [1, T], [1, 3, H, W] -> [1, T, V]
best = logits[0, -1].softmax(-1).topk(3)           # what may stand behind <assistant>
print("in the image:", ", ".join(exam.scenes.describe(0)))
print(exam.texts[0][0], "->", [small.tokenizer.decode([i]) for i in best.indices.tolist()],
      [f"{p:.2f}" for p in best.values.tolist()])

# %% [markdown]
# One pass through the model gives one word. Two rows of different length, padded, must give what each gives alone:

# %%
both = [chat.encode_chat(small.tokenizer, [(q, None)], 144)[0] for q in (exam.texts[0][0], "Describe the image.")]
padded, real = chat.pad_rows(both, small.tokenizer.pad_id, side="left")   # [2, T] each
together = model(padded, exam.pixels[:1].expand(2, -1, -1, -1), real)     # [2, T, V]
for row in range(2):
    alone = model(torch.tensor([both[row]]), exam.pixels[:1])[0]          # [T, V]
    gap = (together[row][real[row]] - alone).abs().amax()
    print(f"row {row}: {int((~real[row]).sum())} places of padding, logits within 0.001 of those alone: {bool(gap < 1e-3)}")

# %% [markdown]
# Padding shifts the shorter row's tokens to later positions, and nothing changes: rotary positions enter attention only as differences. A decoder with learned absolute positions would need `positions` that do not count padding.

# %% [markdown] covers=["5-idea-1"]
# ### From your own parts
#
# The class above borrowed its parts from the package. Put it together from what you wrote in chapters 1 to 3, where your answers pass, and compare. The first lines say whose parts these are.

# %% tags=["nbval-ignore-output"] covers=["5-idea-1"]
from vlm_course.grading.earlier import earlier

select, Bridge, splice = earlier("select_features"), earlier("VisionProjection"), earlier("splice_image_features")
bridge = Bridge(192, 256)
with torch.no_grad():
    for own, trained in zip(bridge.parameters(), small.model.bridge.parameters(), strict=True):
        own.copy_(trained)
    patches = select(model.vision.hidden_states(exam.pixels[:1]), -2, "default")      # -> [1, N, D_vision]
    embeds = splice(model.decoder.embed(ids), ids, bridge(patches), small.tokenizer.image_id)  # -> [1, T, D_llm]
    print("the same logits:", torch.allclose(model.decoder(embeds), logits, atol=1e-4))

# %% [markdown]
# ## Word by word
#
# To write an answer, take the best next word, put it behind the prompt, and run again. It stops at `<eos>`. Taking the best each time is called *greedy*; `vlm_course.generation` has other ways too.
#
# ### Build It: greedy decoding  ·  easy  ·  about 15 minutes  ·  3 points
#
# Write `greedy_decode(model, ids, pixels, max_new_tokens, eos_id)` for one row, `ids` `[1, T]`. Return the new ids `[1, n]`, `<eos>` included where the answer ends with it. Call `model(ids, pixels)` for every token.
#
# <details><summary>Hint 1</summary>The last position's logits predict the next token: logits[:, -1].argmax(dim=-1, keepdim=True) is [1, 1].</details>
# <details><summary>Hint 2</summary>torch.cat([ids, token], dim=1) puts it behind the ids. Look for eos_id in the new token only: earlier turns of a conversation end with it too.</details>
# <details><summary>Hint 3</summary>Remember start = ids.shape[1] before the loop; after it return ids[:, start:].</details>

# %% exercise="greedy_decode" twin="vlm_course.plain.greedy_decode" covers=["5-idea-5"]
@torch.no_grad()
def greedy_decode(model: nn.Module, ids: Tensor, pixels: Tensor, max_new_tokens: int, eos_id: int) -> Tensor:
    """ids [1, T] -> the new ids [1, n]; the whole sequence is read again for every token."""
    ### BEGIN SOLUTION
    start = ids.shape[1]
    for _ in range(max_new_tokens):
        logits = model(ids, pixels)  # [1, T] -> [1, T, V]
        token = logits[:, -1].argmax(dim=-1, keepdim=True)  # [1, V] -> [1, 1]
        ids = torch.cat([ids, token], dim=1)  # [1, T] -> [1, T + 1]
        if token.item() == eos_id:
            break
    return ids[:, start:]
    ### END SOLUTION

# %% check="greedy_decode" points=3
check("greedy_decode", globals())

# %%
greedy_decode = part("greedy_decode", globals())

def ask(words, scene, decode):
    """Answer a question about a scene of the exam."""
    row, _ = chat.encode_chat(small.tokenizer, [(words, None)], small.model.config.visual_tokens)
    new = decode(model, torch.tensor([row]), exam.pixels[scene : scene + 1], 40, small.tokenizer.eos_id)
    return small.tokenizer.decode(new[0])

for words in ("Describe the image.", *exam.texts[0][:4]):
    print(f"{words}  ->  {ask(words, 0, greedy_decode)}")

# %% [markdown]
# Your loop, your class, and an answer about an image. Is it about *this* image? One question about five scenes, with the truth beside it.

# %%
for scene in range(5):
    said, true = ask("how many objects are there?", scene, greedy_decode), int(exam.scenes.present[scene].sum())
    print(f"scene {scene}: the model says {said}, there are {true}: {', '.join(exam.scenes.describe(scene))}")

# %% [markdown]
# ## What the loop does twice
#
# For every word the loop reads the prompt again, and the image, and all that it wrote. How much of that comes out different the second time? Compare the last layer's keys before and after a word is added.

# %%
longer = torch.cat([ids, torch.tensor([[small.tokenizer.id_of("red")]])], dim=1)
keys = []
deep = model.decoder.blocks[5].attention.key                     # the last layer's keys
hook = deep.register_forward_hook(lambda module, inputs, output: keys.append(output[0]))
model(ids, exam.pixels[:1]), model(longer, exam.pixels[:1])
hook.remove()
old, new = keys                                                  # [T, H_kv * d], [T + 1, H_kv * d]
moved = (new[: len(old)] - old).abs().amax()
print(f"keys of the {len(old)} old tokens moved by less than 0.0001: {bool(moved < 1e-4)}")

# %%
reveal("p_5_2", "c", because="A token sees only earlier ones, in every layer, so nothing behind it can change its keys.")

# %% [markdown]
# That is the causal mask's gift. Keys and values of old tokens can be kept. A new token brings one query, which looks at all kept keys. (A model whose text sees the image in both directions, as PaliGemma's prefix, has it too, once the prefix is complete.)

# %% [markdown]
# ### A trap on the way
#
# PyTorch's attention has a flag `is_causal`. With one query and several keys it lines up the *first* query with the *first* key, so the newest token sees only the oldest. The course's `attend` lines up the last ones.

# %%
from vlm_course.attention import attend

keys, values = torch.zeros(1, 1, 4, 2), torch.arange(4.0).view(1, 1, 4, 1).expand(1, 1, 4, 2)   # [B, H, S, d]
query = torch.zeros(1, 1, 1, 2)                                                                  # the newest token
theirs = nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
ours = attend(query, keys, values, is_causal=True)
print("values 0, 1, 2, 3 with equal weights:")
print(f"PyTorch's flag reads {theirs[0, 0, 0, 0]:.1f}, our attend reads {ours[0, 0, 0, 0]:.1f}")

# %% [markdown]
# ### Build It: a KV cache  ·  medium  ·  about 15 minutes  ·  3 points
#
# Write `PlainKVCache`. `update(layer, keys, values)` appends the new tokens' keys and values `[B, H, T, d]` to what that layer has, and returns all. `length` is the number of tokens stored. The decoder calls both: `length` tells it the position of the next token.
#
# <details><summary>Hint 1</summary>A dictionary layer -> (keys, values), made in __init__. A dictionary in the class itself would be shared by all caches.</details>
# <details><summary>Hint 2</summary>Tokens are dimension 2. Old ones first: torch.cat([past, new], dim=2).</details>
# <details><summary>Hint 3</summary>length is self.stored[0][0].shape[2], or 0 as long as nothing is stored.</details>

# %% exercise="plain_kv_cache" twin="vlm_course.plain.PlainKVCache" covers=["5-idea-4"]
class PlainKVCache:
    """Keys and values of all tokens so far, for each layer: what attention would otherwise compute again."""

    def __init__(self):
        ### BEGIN SOLUTION
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
        ### END SOLUTION

    @property
    def length(self) -> int:
        """Tokens stored, the same for every layer between two calls of the model."""
        ### BEGIN SOLUTION
        return self.stored[0][0].shape[2] if self.stored else 0
        ### END SOLUTION

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, T, d] of the new tokens; return those of all tokens, [B, H, past + T, d]."""
        ### BEGIN SOLUTION
        if layer in self.stored:
            past_keys, past_values = self.stored[layer]
            keys = torch.cat([past_keys, keys], dim=2)  # [B, H, past, d], [B, H, T, d] -> [B, H, past + T, d]
            values = torch.cat([past_values, values], dim=2)
        self.stored[layer] = keys, values
        return keys, values
        ### END SOLUTION

# %% check="plain_kv_cache" points=3
check("plain_kv_cache", globals())

# %%
PlainKVCache = part("PlainKVCache", globals())
cache = PlainKVCache()
model.decoder(model.embed(ids, exam.pixels[:1]), cache=cache)   # read the prompt once
sizes = small.model.config.text
print(f"{cache.length} tokens, {sizes.layers} layers, keys of a layer {[1, sizes.kv_heads, cache.length, sizes.head_dim]}")

# %% [markdown] covers=["5-idea-5"]
# ### Build It: decoding with the cache  ·  medium  ·  about 20 minutes  ·  4 points
#
# Write `greedy_cached`, with the arguments and the result of `greedy_decode`. The prompt and its image are read once; after that the decoder gets one token at a time, through `model.decoder(embeds, cache=cache)`. The check counts what your decoder reads.
#
# <details><summary>Hint 1</summary>Before the loop: cache = PlainKVCache() and embeds = model.embed(ids, pixels). Make the cache inside the function, or two questions share it.</details>
# <details><summary>Hint 2</summary>The pass over the prompt already gives the first new token: logits[:, -1].</details>
# <details><summary>Hint 3</summary>At the end of each step embeds = model.decoder.embed(token), [1, 1, D]. Collect the tokens in a list and torch.cat them along dim 1.</details>

# %% exercise="greedy_cached" twin="vlm_course.plain.greedy_cached" covers=["5-idea-5"]
@torch.no_grad()
def greedy_cached(model: nn.Module, ids: Tensor, pixels: Tensor, max_new_tokens: int, eos_id: int) -> Tensor:
    """`greedy_decode` with a cache: the prompt and its image are read once, then one token at a time."""
    ### BEGIN SOLUTION
    cache = PlainKVCache()
    embeds, new = model.embed(ids, pixels), []  # [1, T] -> [1, T, D]
    for _ in range(max_new_tokens):
        logits = model.decoder(embeds, cache=cache)  # [1, T, D], then [1, 1, D] -> [1, T or 1, V]
        token = logits[:, -1].argmax(dim=-1, keepdim=True)  # [1, V] -> [1, 1]
        new.append(token)
        if token.item() == eos_id:
            break
        embeds = model.decoder.embed(token)  # [1, 1] -> [1, 1, D]
    return torch.cat(new, dim=1)  # n x [1, 1] -> [1, n]
    ### END SOLUTION

# %% check="greedy_cached" points=4
check("greedy_cached", globals())

# %%
greedy_cached = part("greedy_cached", globals())
questions = [(words, scene) for scene in (2, 3) for words in ("Describe the image.", *exam.texts[scene][:3])]
answers, seconds = {}, {}
for decode in (greedy_decode, greedy_cached):
    start = time.perf_counter()
    answers[decode] = [ask(words, scene, decode) for words, scene in questions]
    seconds[decode] = time.perf_counter() - start
same = sum(a == b for a, b in zip(*answers.values(), strict=True))
print(f"{same} of {len(questions)} answers are the same, word for word")

# %% [markdown]
# The cache changes no word. It changes the work: an answer of *n* words to a prompt of *T* tokens made the decoder read *nT + n(n - 1)/2* tokens; now it reads *T + n - 1*. The same answers, in seconds on your computer:

# %% tags=["nbval-ignore-output"]
print(f"reading everything again {seconds[greedy_decode]:6.2f} s")
print(f"with the cache           {seconds[greedy_cached]:6.2f} s")

# %% [markdown]
# The price is memory: two vectors for each token and layer. You counted 819,200 bytes a token for 13B, and most tokens are image. The package's own cache grows in place instead of being copied, and serves several questions about one image.

# %% [markdown] covers=["5-simulation-1"]
# ## The forward pass, watched
#
# Hooks on the modules of the shipped model note every shape and every time while it answers. One square is one token, in reading order: image, words, answer. Full colour means that this pass reads it, pale that it comes from the cache.

# %% [markdown] covers=["5-simulation-1"]
# Pass 1 reads everything. Move on to pass 2, then switch the cache off. What happens to the squares, and what to the times?

# %% tags=["nbval-ignore-output"] covers=["5-simulation-1"]
from vlm_course.simulations.forward_pass import fastest, forward_simulation, record

simulation = forward_simulation(small.model, small.tokenizer, exam.pixels[0], ["Describe the image.", *exam.texts[0][:4]])
simulation.first_frame()
simulation

# %% [markdown]
# With the cache the vision tower works in the first pass only, and later passes are short. Without it, tower and decoder do all their work again for every word, and a little more. The head's shape shows that the first pass scores the next word at every position, though only the last is needed; `logits_to_keep=1` saves that.

# %% [markdown]
# ## The same weights in transformers
#
# A class with your own names is of use only if the world's weights fit. `convert` holds a table of names. Here our trained model becomes a `LlavaForConditionalGeneration`, and back.

# %%
from vlm_course.convert import llama
from vlm_course.convert import llava as convert

theirs = convert.as_transformers(small.model)
print(type(theirs).__name__, f"with {len(theirs.state_dict())} tensors; ours has {len(model.state_dict())}")
for ours, name in [*convert.BRIDGE.names.items(), *list(llama.DECODER.names.items())[1:4]]:
    print(f"{ours:35s} {name}")

# %% [markdown]
# The numbers of tensors differ: our tower keeps queries, keys and values in one matrix, theirs in three. The values must agree all the same.

# %%
with torch.no_grad():
    wanted = theirs(input_ids=exam.ids, pixel_values=exam.pixels).logits   # [8, T, V]
    got = model(exam.ids, exam.pixels)
print("largest logit", f"{wanted.abs().amax():.0f}", "  equal to 0.001:", bool((wanted - got).abs().amax() < 1e-3))
print("best words equal:", bool((wanted.argmax(-1) == got.argmax(-1)).all()))
back = convert.from_transformers(theirs.state_dict())
print("there and back, bit for bit:", all(torch.equal(back[k], v) for k, v in small.model.state_dict().items()))

# %%
row = torch.tensor([chat.encode_chat(small.tokenizer, [("Describe the image.", None)], 144)[0]])
new = theirs.generate(input_ids=row, pixel_values=exam.pixels[:1], attention_mask=torch.ones_like(row), max_new_tokens=40,
                      do_sample=False, eos_token_id=small.tokenizer.eos_id, pad_token_id=0)
print("theirs:", small.tokenizer.decode(new[0, row.shape[1]:]))
print("yours: ", ask("Describe the image.", 0, greedy_cached))

# %% [markdown]
# So the same table reads LLaVA-1.5-7B and 13B: `convert.llava.load_llava(folder)` fills the course's class from the files that you download, and your `PlainLlava(LLAVA_7B)` takes the same names. Two real configurations, without their numbers:

# %%
for name, config in (("7B", LLAVA_7B), ("13B", LLAVA_13B)):
    with torch.device("meta"):
        real_size = PlainLlava(config)
    print(f"{name}: {sum(p.numel() for p in real_size.parameters()):,} parameters in your class")

# %% [markdown] covers=["5-table-1"]
# ## Where the time goes
#
# First the small model on your computer, stage by stage: the least of five answers of the same words, so that other programs disturb as little as may be.

# %% tags=["nbval-ignore-output"] covers=["5-table-1"]
from skimage.data import astronaut

from vlm_course.images import Image, clip_preprocess, pad_to_square, small_preprocess

photograph = Image.fromarray(astronaut())
start = time.perf_counter()
small_preprocess(photograph)
live = {"preprocessing": 1000 * (time.perf_counter() - start)}
live |= fastest([record(small.model, small.tokenizer, exam.pixels[0], "Describe the image.") for _ in range(5)])
for stage, milliseconds in live.items():
    print(f"{stage:14s}{milliseconds:8.2f} ms" + ("  for each word" if stage == "decode" else ""))

# %% [markdown]
# The order is the lesson's: the bridge takes next to nothing, and a description takes longer than reading the image. But these are small matrices on a CPU. For the real sizes, start with what no machine can beat.

# %% [markdown] covers=["5-table-1"]
# ### Preprocessing
#
# The lesson says: resize to 336 pixels, normalise to between -1 and 1. That is SigLIP's range. CLIP subtracts a mean and divides by a spread for each colour; LLaVA-1.5 first pads to a square.

# %%
for name, picture in (("white", Image.new("RGB", (640, 480), "white")), ("black", Image.new("RGB", (640, 480)))):
    pixels = clip_preprocess(picture)                    # -> [3, 336, 336]
    print(name, [f"{channel:.2f}" for channel in pixels.amax((1, 2)).tolist()])
print("a photograph of 640 x 480, padded:", tuple(clip_preprocess(pad_to_square(picture)).shape))

# %% [markdown] covers=["5-table-1", "5-idea-5"]
# ### Derivation: the floor of a pass  ·  easy  ·  about 10 minutes  ·  2 points
#
# A pass of `tokens` tokens multiplies each of `weights` weights with each token, a multiplication and an addition, and fetches each 16-bit weight from memory once. Write `pass_floor_ms(weights, tokens, peak_flops, bandwidth)`: the milliseconds below which no program gets. Both happen at the same time.
#
# <details><summary>Hint 1</summary>Two times in seconds: operations divided by peak_flops, bytes divided by bandwidth.</details>
# <details><summary>Hint 2</summary>2 * weights * tokens operations; 2 * weights bytes. The slower of the two is the floor.</details>
# <details><summary>Hint 3</summary>1000 * max(2 * weights * tokens / peak_flops, 2 * weights / bandwidth)</details>

# %% exercise="pass_floor_ms" twin="vlm_course.gpu_times.pass_floor_ms" covers=["5-table-1"]
def pass_floor_ms(weights: int, tokens: int, peak_flops: float, bandwidth: float) -> float:
    """The least milliseconds of a pass of `tokens` tokens through `weights` 16-bit weights."""
    ### BEGIN SOLUTION
    arithmetic = 2 * weights * tokens / peak_flops
    traffic = 2 * weights / bandwidth
    return 1000 * max(arithmetic, traffic)
    ### END SOLUTION

# %% check="pass_floor_ms" points=2
check("pass_floor_ms", globals())

# %%
pass_floor_ms = part("pass_floor_ms", globals())
weights = budget.decoder_parameters(LLAVA_13B.text) - 32064 * 5120   # the embedding table is looked up, not multiplied
for name in ("RTX 4090", "A100-80GB", "H100-80GB", "H200-141GB"):
    gpu = budget.GPUS[name]
    read, write = (pass_floor_ms(weights, tokens, gpu.flops, gpu.bandwidth) for tokens in (626, 1))
    room = "" if 2 * weights < gpu.memory else "   (26 GB do not fit in it)"
    print(f"{name:12s} 13B reads 626 tokens: {read:5.1f} ms   writes one: {write:5.2f} ms{room}")

# %% [markdown]
# Reading 626 tokens is bound by arithmetic, writing one by memory: all weights are fetched for a single multiplication each. On an A100 a word costs a quarter of the whole prompt, on an H100 nearly half. That decides the first prediction.

# %% covers=["5-idea-5"]
read = budget.prefill_seconds(LLAVA_13B, "A100-80GB", 626, images=1)
write = budget.decode_seconds(LLAVA_13B, "A100-80GB", 626, 100)
reveal("p_5_1", "d", because=f"At best {1000 * read:.0f} ms for reading, {1000 * write:.0f} ms for 100 words: "
                             f"{write / read:.0f} times as long.")

# %% [markdown] covers=["5-table-1"]
# ### The lesson's table against two machines
#
# The lesson gives times for the 13B model and names no machine. Put the floors of an A100 and an H100 beside them. `budget` counts more exactly than your formula: attention too, and the head for one position only.

# %% covers=["5-table-1"]
def floors(config, name):
    """Milliseconds of each stage that no program can beat on that GPU."""
    gpu = budget.GPUS[name]
    bridge = budget.bridge_flops("mlp", 576, 1024, config.text.width)
    return {"vision tower": 1000 * budget.vit_flops(config.vision, layers=23) / gpu.flops,
            "bridge": 1000 * bridge / gpu.flops,
            "prefill": 1000 * budget.prefill_seconds(config.text, gpu, 626),
            "decode": 1000 * budget.decode_seconds(config, gpu, 626, 1)}

least = {name: floors(LLAVA_13B, name) for name in ("A100-80GB", "H100-80GB")}
print(f"{'13B':14s}{'lesson':>8s}{'A100 floor':>12s}{'H100 floor':>12s}")
for stage, floor in least["A100-80GB"].items():
    low = "   below the A100's floor" if gpu_times.LESSON[stage] < floor else ""
    print(f"{stage:14s}{gpu_times.LESSON[stage]:8.1f}{floor:12.3g}{least['H100-80GB'][stage]:12.3g}{low}")

# %% [markdown] covers=["5-table-1"]
# Two rows lie below an A100's floor. The bridge by a rounding: 0.1 for 0.116. The prefill by far: 30 ms, where 51 are needed at the peak rate, and no program reaches the peak. So that row is not an A100's.

# %% [markdown] covers=["5-table-1"]
# Do the two large rows belong to one machine? Say that a program reaches half of the peak, a usual catch:

# %% covers=["5-table-1"]
for name, row in least.items():
    print(f"{name:10s} at half of the peak: reads in {2 * row['prefill']:.0f} ms, writes a word in {2 * row['decode']:.0f} ms")
print(f"{'lesson':10s} reads in {gpu_times.LESSON['prefill']:.0f} ms, writes a word in {gpu_times.LESSON['decode']:.0f} ms")

# %% [markdown] covers=["5-table-1"]
# For reading the lesson is with the H100, for writing between the two. Rows of several machines would explain that. It is a guess: an H100 could keep to every row. What is proven is that an A100 cannot.

# %% [markdown]
# What do real programs reach? Measured on H100s, with random weights of the real sizes:

# %% covers=["5-table-1"]
measurements = gpu_times.stored()
print(f"{measurements.machine}, {measurements.date}")
h100 = {"7B": floors(LLAVA_7B, "H100-80GB"), "13B": least["H100-80GB"]}
print(f"{'milliseconds':36s}{'7B':>10s}{'floor':>8s}{'13B':>8s}{'floor':>8s}")
for stage, settings in [(s, "plain script") for s in h100["7B"]] + [("decode", "static cache, compiled")]:
    small_one, large_one = (str(measurements.find(stage, size, settings) or "-") for size in ("7B", "13B"))
    low, high = h100["7B"][stage], h100["13B"][stage]
    print(f"{stage + ', ' + settings:36s}{small_one:>10s}{low:8.2f}{large_one:>8s}{high:8.2f}")

# %% [markdown]
# The measured prefill includes the image. A plain script writes a word of 7B in about 30 ms, seven times its floor: most of the time the GPU waits for Python. Compiled, with a static cache, it takes 9. So "20 ms a word" says as much about the program as about the machine.

# %%
print(measurements.source)
print(measurements.conditions)

# %% [markdown] covers=["5-idea-5"]
# ### Is decoding the bottleneck?
#
# For 100 words, yes. The lesson's factor of 40 belongs to its table and to 100 words. Ask for one word, as many benchmarks do, and reading is the larger part:

# %% covers=["5-idea-5"]
lengths = [1, 2, 5, 10, 20, 50, 100, 200]
figure, axis = figures.axes(width=5.6, height=2.6)
for name, colour in (("A100-80GB", figures.VISION), ("H100-80GB", figures.TEXT)):
    reading = budget.prefill_seconds(LLAVA_13B, name, 626, images=1)
    share = [100 * budget.decode_seconds(LLAVA_13B, name, 626, n) for n in lengths]
    share = [value / (value + 100 * reading) for value in share]
    axis.plot(lengths, [100 * s for s in share], "o-", color=colour, label=name)
axis.axhline(50, color=figures.GREY, linestyle="--", linewidth=1)
axis.set(xscale="log", xlabel="words in the answer", ylabel="% of the time spent writing", ylim=(0, 100))
axis.legend(loc="lower right")
figures.show(figure, f"Share of the time spent writing, at best, for 13B: {100 * share[0]:.0f} % for one word on an H100, "
                     f"over 95 % for 200 words; both GPUs cross one half before five words.")

# %% [markdown] covers=["5-idea-5", "5-idea-4"]
# Vision counts in another way too. The tower is cheap, but its 576 tokens are 92 % of what the language model reads. Fewer visual tokens are a speed-up of the *language model*, made on the side of vision:

# %% covers=["5-idea-5", "5-idea-4"]
for visual in (576, 144, 64):
    reading = 1000 * budget.prefill_seconds(LLAVA_13B.text, "A100-80GB", visual + 50)
    cache = budget.kv_cache_bytes(LLAVA_13B, visual + 50) / 1e9
    print(f"{visual:4d} visual tokens: reading {reading:5.1f} ms at best, keys and values {cache:.2f} GB")
tower = budget.vit_flops(LLAVA_13B.vision, layers=23)
print(f"tower for one image {tower / 1e12:.2f} TFLOP, for five tiles of AnyRes {5 * tower / 1e12:.1f} TFLOP, "
      f"13B reads 626 tokens {budget.decoder_flops(LLAVA_13B.text, 626) / 1e12:.1f} TFLOP")

# %% [markdown] covers=["5-idea-2"]
# ## Why the penultimate layer?
#
# The lesson's reason: the last layer is one global vector, only the layer before it still has patches. Count.

# %% covers=["5-idea-2"]
with torch.device("meta"):
    tower, picture = VisionTransformer(LLAVA_13B.vision), torch.empty(1, 3, 336, 336)
    states = tower.hidden_states(picture)     # 25 x [1, 577, 1024]
print("last layer:       ", list(states[-1].shape))
print("penultimate layer:", list(states[-2].shape))
print("a user of CLIP's pooled output gets", list(tower.pooled(picture).shape))

# %% [markdown]
# Both layers hold 577 tokens. What differs is what they were trained for: CLIP's loss looks at the last layer's class token alone, so its patches are held to nothing (chapter 1 shows their gradient: zero). That is a reason to *expect* less from them. Does it matter?

# %% [markdown] covers=["5-idea-2"]
# An experiment. The shipped tower stays frozen. A fresh bridge and a fresh decoder of under a million numbers learn from one layer's patches: same images, same conversations, same first weights for each seed. Only the layer differs. A fifth variant gets zeros.

# %% covers=["5-idea-2"]
from vlm_course.studies.results import load_results
from vlm_course.studies.feature_layer import BLIND, LAYERS, load_variant

study = load_results("feature-layer")
print(study.note(), "\n")
kinds = ("colour", "shape", "count", "existence", "relation")
print(f"{'exact answers':17s}" + "".join(f"{kind:>11s}" for kind in (*kinds, "all")) + f"{'spread':>8s}{'boxes off':>11s}")
for variant in study.variants:
    row = "".join(f"{study.mean(variant, kind, 'model'):11.3f}" for kind in (*kinds, "all"))
    spread, box = study.spread(variant, "all", "model"), study.mean(variant, "box error", "model")
    print(f"{variant:17s}{row}{spread:8.3f}{box:8.1f} px")
for control in ("swapped", "majority"):
    row = "".join(f"{study.mean('penultimate', kind, control):11.3f}" for kind in (*kinds, "all"))
    print(f"{control:17s}{row}")

# %% [markdown]
# "Spread" is the difference between the best and the worst of three seeds; a gap smaller than it says nothing. "Swapped" answers from another scene's features with the penultimate reader, "majority" gives every kind its most frequent answer. Why does *blind* beat it? Each image comes with several turns, and earlier answers give later ones away: whoever just read that a star is brown knows the shape of the brown object.

# %% covers=["5-idea-2"]
figure, axis = figures.axes(width=5.8, height=2.6)
for place, variant in enumerate(LAYERS):
    values = [100 * value for value in study.value(variant, "all", "model")["values"]]
    axis.plot([place] * len(values), values, "o", color=figures.VISION)
    axis.plot([place - 0.2, place + 0.2], [sum(values) / len(values)] * 2, color=figures.VISION)
blind = 100 * study.mean(BLIND, "all", "model")
axis.axhline(blind, color=figures.GREY, linestyle="--", linewidth=1)
axis.text(-0.4, blind + 1, "blind", color=figures.GREY, fontsize=8)
axis.set(xticks=range(len(LAYERS)), xticklabels=list(LAYERS), ylabel="exact answers (%)", ylim=(0, 102), xlim=(-0.5, 3.5))
order = sorted(LAYERS, key=lambda variant: -study.mean(variant, "all", "model"))
figures.show(figure, "Exact answers by the layer that was read, a dot a seed; from best to worst: " + ", ".join(order) + ".")

# %%
late = [study.value(variant, "all", "model") for variant in LAYERS if variant != "first"]
gap = max(value["mean"] for value in late) - min(value["mean"] for value in late)
best = "tie" if gap < max(value["spread"] for value in late) else order[0]
gaps = [f"{name} {100 * study.mean(name, 'all', 'model'):.1f} %" for name in order]
study.reveal("p_5_3", best, because=f"Exact answers: {', '.join(gaps)}; blind {blind:.1f} %.")

# %% [markdown] covers=["5-idea-2"]
# So the lesson's reason is wrong, and ours was only an expectation: the patches of the last layer, which CLIP's loss never looks at, carry about as much as those before them. A possible reason, which this study does not test: a block adds to what the residual stream holds, and need not erase it. What is too *early* costs more, and it makes learning fragile: look how far apart the seeds of the first block lie.

# %% [markdown]
# One seed of each variant is shipped, so you can ask them yourself. The same questions, the same image, four layers:

# %% covers=["5-idea-2"]
for variant in LAYERS:
    reader = load_variant(study, variant, small)
    answers = []
    for words in exam.texts[0][:4]:
        row, _ = chat.encode_chat(small.tokenizer, [(words, None)], 144)
        new = generation.generate(reader, torch.tensor([row]), exam.pixels[:1], max_new_tokens=12, eos_id=small.tokenizer.eos_id)
        answers.append(small.tokenizer.decode(new[0]))
    print(f"{variant:17s}" + "   ".join(answers))
print(f"{'true':17s}" + "   ".join(small.tokenizer.decode(exam.labels[0][exam.turn[0] == k]) for k in range(4)))

# %% [markdown] covers=["5-idea-2"]
# Train the comparison again here: a rehearsal takes a minute or two and shows the form of the table, not the result. With a GPU the whole study takes a few minutes. Nothing starts before you click.

# %% tags=["nbval-ignore-output"]
from vlm_course.studies.rerun import rerun

rerun("feature-layer")

# %% [markdown] covers=["5-idea-2"]
# What this does not show: our tower has 6 blocks and sees coloured shapes; CLIP ViT-L has 24 and saw the web. LLaVA's authors found the last layer 0.96 points worse than the one before on ScienceQA (section 5.2 of their paper, from memory). Trained at 1.4B to 7B, LLaVA-style models need deep layers to read text; shallow and middle ones count and place better ("Rethinking Visual Layer Selection in Multimodal LLMs", arXiv 2504.21447, abstract).

# %% [markdown] covers=["5-idea-3"]
# ## Why simplicity works, and how far the reason goes
#
# Tower and language model bring their skills along; the bridge only has to connect them. That explains why one small part is enough to *start*. It does not follow that the bridge does all the translating: in stage 2 the language model learns with it.

# %% covers=["5-idea-3"]
stage_1 = budget.parameters(LLAVA_13B) - budget.vit_parameters(LLAVA_13B.vision) - budget.decoder_parameters(LLAVA_13B.text)
stage_2 = stage_1 + budget.decoder_parameters(LLAVA_13B.text)
whole = budget.parameters(LLAVA_13B)
print(f"13B, parameters that learn: stage 1 {100 * stage_1 / whole:.2f} %, stage 2 {100 * stage_2 / whole:.1f} %")

# %% [markdown]
# Another gain of simplicity is plain in your own code: the decoder is an ordinary one. Its cache, its kernels and its quantisation work without a change, because visual tokens are to it just tokens.

# %% [markdown]
# ## Where it fails
#
# The best next word is always *some* word. Ask for the colour of a thing that is not there: nothing in the loop can refuse. Six scenes, and for each a shape that it does not hold.

# %%
from vlm_course.worlds.scenes import COLOURS, SHAPES

named = 0
for scene in range(6):
    held = exam.scenes.shape[scene][exam.scenes.present[scene]].tolist()
    absent = next(name for number, name in enumerate(SHAPES) if number not in held)
    said = ask(f"what color is the {absent}?", scene, greedy_cached)
    named += said in COLOURS
    print(f"no {absent} here; what color is it?  {said}")
print(f"{named} of 6 answers name a colour")

# %% [markdown]
# In training, a question about a colour always had an object to be about, so saying "there is none" was never the right answer. Chapter 3 measures a relative of this error: yes to what is absent.

# %% [markdown]
# Two limits of the code: `greedy_cached` takes one row at a time, since rows that end early need more bookkeeping, and `torch.cat` copies the whole cache for every word. `generation.generate` and `cache.KVCache` do better in both.

# %% [markdown] covers=["5-check-1"]
# ## Check question
#
# Choose on the buttons to read the reason for each option, then return your letter below: that is the answer that counts.

# %% covers=["5-check-1"]
question("q_5_1")

# %% exercise="q_5_1"
def q_5_1() -> str:
    """Return the letter of your answer."""
    ### BEGIN SOLUTION
    return "b"
    ### END SOLUTION

# %% check="q_5_1" points=1 covers=["5-check-1"]
check("q_5_1", globals())

# %% [markdown]
# ## Claims of the chapter
#
# What the source lesson says, in our words, what is true, and the section of this chapter that shows it. The last column says how strong the evidence is.

# %%
from vlm_course.claims import claim_table

claim_table(5)

# %% [markdown]
# ## What you built, and where it lives
#
# - `PlainLlava`, `greedy_decode`, `PlainKVCache`, `greedy_cached`: `vlm_course/plain.py`. With options and more speed: `llava.py`, `decoder.py`, `generation.py`. In transformers: `LlavaForConditionalGeneration`, `DynamicCache`, `generate`.
# - `pass_floor_ms` and the stored times: `vlm_course/gpu_times.py`; the exact counts: `vlm_course/budget.py`.
# - the weight tables: `vlm_course/convert/`; the study: `vlm_course/studies/feature_layer.py`.

# %% [markdown]
# **Read next.** Liu et al. 2023, *Visual Instruction Tuning* (arXiv 2304.08485), section 4.1 for the architecture. Liu et al. 2024, *Improved Baselines with Visual Instruction Tuning* (arXiv 2310.03744), section 3 for version 1.5. Williams et al. 2009, *Roofline*, for the two kinds of floor.

# %% [markdown]
# You have the model and loaded somebody's weights. Chapter 6 makes such weights: which part learns when, on what, for how long.
