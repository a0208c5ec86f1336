# %% [markdown] covers=["1-idea-1"]
# # Chapter 1: Vision encoders
#
# How does a grid of pixels become a row of vectors that a language model can read? This chapter cuts images into patches, follows them through CLIP's vision tower shape by shape, and asks which of the tower's outputs learn anything.

# %% [markdown]
# **By the end you can**
#
# - cut an image into patches by hand, and say why a convolution does the same;
# - trace CLIP ViT-L/14 from 336 x 336 pixels to the 576 vectors that LLaVA takes;
# - predict what more pixels or smaller patches cost, term by term;
# - write CLIP's loss, and show which outputs of the tower it trains.

# %%
from vlm_course.build.costs import measured

print("Reading and doing: about 120 minutes.")
print(measured("01_vision_encoders"))

# %% [markdown]
# You need PyTorch tensors and the idea of attention: every token looks at every token. Chapter 0 is useful, not required. The small model that comes with the course is read from the package; nothing is downloaded.

# %% locked="imports"
import torch
import torch.nn.functional as F

from vlm_course import encoder_study, encoders
from vlm_course.contrastive import MAX_LOGIT_SCALE
from vlm_course.grading import check, part, question
from vlm_course.progress import predict, reveal
from vlm_course.simulations import figures

# %% [markdown]
# ## Predict first
#
# Three questions before anything runs. Choose an answer and say how sure you are. Your answers stay in a file on this computer; the last chapter shows how well your confidence matched your hits.

# %%
predict("p_1_1", "CLIP ViT-L/14 gets 672 x 672 pixels instead of 336 x 336. The operations of the whole tower grow ...",
        {"a": "4 times, like the pixels", "b": "about 5 times", "c": "16 times, like the pairs of tokens"})

# %%
predict("p_1_2", "CLIP learns by matching images with captions. How strongly does its loss pull at the outputs of the "
        "last layer for the 576 patches?", {"a": "as strongly as at the class token", "b": "weakly, but it does",
                                            "c": "not at all: the gradient is exactly zero"})

# %%
predict("p_1_3", "A scene holds one object. A linear map tries to read where it is, from the one vector that is compared "
        "with captions, or from the vectors of the patches.", {"a": "both give the place", "b": "the patches do better, "
        "the vector gives a rough place", "c": "only the patches do; the vector is no better than a fixed guess"})

# %% [markdown] covers=["1-idea-1"]
# ## Cutting an image into patches
#
# Start with one channel of 4 x 6 pixels, numbered in reading order, and patches of 2 x 2. A loop over the upper left corners takes each square out and writes its pixels in a row.

# %%
picture = torch.arange(24).view(4, 6)                    # [rows, columns]
print("\n".join(" ".join(f"{value:2d}" for value in row) for row in picture.tolist()), "\n")

loop = []
for top in range(0, 4, 2):
    for left in range(0, 6, 2):
        loop.append(picture[top:top + 2, left:left + 2].flatten())
print("\n".join(" ".join(f"{value:2d}" for value in patch.tolist()) for patch in loop))

# %% [markdown]
# Six patches, row by row. The first holds 0, 1, 6, 7: pixels that touch in the picture but lie apart in memory. That is why a plain reshape to six rows of four does something else.

# %%
print("reshape:", picture.reshape(6, 4)[0].tolist(), "  patch:", loop[0].tolist())
six_axes = picture.reshape(2, 2, 3, 2)                   # [rows of patches, row in patch, columns of patches, column]
together = six_axes.permute(0, 2, 1, 3).reshape(6, 4)    # -> [2, 3, 2, 2] -> [6, 4]
print("split, exchange the two middle axes, join:", torch.equal(together, torch.stack(loop)))

# %% [markdown]
# Split each side into (which patch, where in it), move the two "which" axes to the front, join. The loop is gone, and a batch with three channels is the same with two axes more.

# %% [markdown] covers=["1-idea-1"]
# ### Build It: patchify  ·  medium  ·  about 15 minutes  ·  4 points
#
# Write `patchify(image, patch_size)` for a batch: `[B, C, H, W]` to `[B, N, C*p*p]`. Patches come row by row; inside a patch the order is channel, row, column. The image need not be square; the patch size divides both sides.
#
# <details><summary>Hint 1</summary>Split the height into (rows of patches, rows in a patch), and the width likewise, with one reshape.</details>
# <details><summary>Hint 2</summary>After the reshape the axes are [B, C, rows, p, columns, p]. Which order puts a patch's own axes last?</details>
# <details><summary>Hint 3</summary>permute(0, 2, 4, 1, 3, 5), then reshape to [B, rows * columns, C * p * p].</details>

# %% exercise="patchify" twin="vlm_course.patches.patchify" covers=["1-idea-1"]
def patchify(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images into square patches: [B, C, H, W] -> [B, N, C*p*p]."""
    ### BEGIN SOLUTION
    B, C, H, W = image.shape
    p = patch_size
    x = image.reshape(B, C, H // p, p, W // p, p)  # [B, C, H, W] -> [B, C, rows, p, cols, p]
    x = x.permute(0, 2, 4, 1, 3, 5)  # [B, C, rows, p, cols, p] -> [B, rows, cols, C, p, p]
    return x.reshape(B, (H // p) * (W // p), C * p * p)  # [B, rows, cols, C, p, p] -> [B, N, C*p*p]
    ### END SOLUTION

# %% check="patchify" points=4 covers=["1-idea-1"]
check("patchify", globals())

# %% [markdown]
# ### A photograph, as the tower gets it
#
# Astronaut Eileen Collins, a NASA photograph in the public domain, at the 336 pixels of LLaVA-1.5. Your `patchify` cuts it, or the package's until yours passes. Beside it one patch, and its 588 values: 14 x 14 pixels, three colours each.

# %%
patchify = part("patchify", globals())
from vlm_course.simulations.image_patchification import photograph, resized

photo = resized(photograph(), 336)                       # [1, 3, 336, 336] in [0, 1]
pieces = patchify(photo, 14)                             # [1, 3, 336, 336] -> [1, 576, 588]
print(list(photo.shape), "->", list(pieces.shape), "  14 * 14 =", 14 * 14, "pixels,", 14 * 14 * 3, "values a patch")

# %% folded=true
place = 24 * 4 + 9                                       # row 4, column 9: an eye
apart = F.pad(pieces.view(576, 3, 14, 14), (2, 2, 2, 2), value=1.0)                    # white frames: [576, 3, 18, 18]
apart = apart.view(24, 24, 3, 18, 18).permute(2, 0, 3, 1, 4).reshape(3, 432, 432)      # back to a picture
figure, axes = figures.axes(1, 3, width=8.2, height=2.6, width_ratios=(1.3, 1, 1.2))
axes[0].imshow(apart.permute(1, 2, 0))
axes[1].imshow(pieces[0, place].view(3, 14, 14).permute(1, 2, 0))
for channel, colour in enumerate(("#c0392b", "#1e8449", "#2166ac")):
    axes[2].plot(range(196 * channel, 196 * channel + 196), pieces[0, place, 196 * channel:196 * channel + 196],
                 color=colour, linewidth=0.8)
for axis, title in zip(axes, ("576 patches", "patch 105", "its 588 values: red, green, blue"), strict=True):
    axis.set(title=title)
for axis in axes[:2]:
    axis.set(xticks=[], yticks=[])
figures.show(figure, "Left, the photograph of an astronaut cut into 24 by 24 patches with white gaps. In the middle one "
             "patch of 14 by 14 pixels at an eye. Right, its 588 values in a row, red, then green, then blue.")

# %% [markdown]
# *Figure: what the tower starts from. It gets 576 rows of 588 numbers; that two rows were neighbours, or that the numbers were a square, nobody tells it.*

# %% [markdown] covers=["1-idea-1"]
# ## One linear map, or one convolution
#
# Flattening is not all: the same linear map then turns every patch into a vector of the tower's width. Here with trained numbers, those of the course's small tower: patches of 8 x 8, so 192 values, to a width of 192.

# %%
from vlm_course.pretrained import load_small

small = load_small()
tower = small.contrastive.vision.eval()
weight = tower.patch_embedding.weight                    # [D, C, p, p]
view = 2 * resized(photograph(), 96) - 1                 # [1, 3, 96, 96] in [-1, 1], what this tower takes
print("weight", list(weight.shape), " bias:", tower.patch_embedding.bias)

# %% [markdown]
# Three ways to the same 144 vectors: a loop over patches and filters, `patchify` and one matrix product, and a convolution whose stride is its kernel's size. The third is how CLIP and timm write it.

# %%
by_loop = torch.empty(1, 144, 192)
for n in range(144):
    top, left = 8 * (n // 12), 8 * (n % 12)
    for d in range(192):
        by_loop[0, n, d] = (view[0, :, top:top + 8, left:left + 8] * weight[d]).sum()
by_matrix = patchify(view, 8) @ weight.flatten(1).T                              # [1, 144, 192] x [192, D]
by_convolution = F.conv2d(view, weight, stride=8).flatten(2).transpose(1, 2)     # [1, D, 12, 12] -> [1, 144, D]
print("loop = matrix:     ", torch.allclose(by_loop, by_matrix, atol=1e-4))
print("matrix = convolution:", torch.allclose(by_matrix, by_convolution, atol=1e-4))

# %% [markdown]
# So "chop into patches, flatten, add positions" leaves out the step that is learned: 192 filters here, each 8 x 8 pixels in three colours, slid in steps of 8. CLIP's have no bias, and a LayerNorm follows before the first block.

# %% [markdown] covers=["1-idea-1"]
# ## A class token, and a place for each
#
# Attention treats its input as a set. So two things are added before it. A **position**: one learned vector for each place. And a **class token**: a learned vector in front, with no patch of its own, that can collect what the whole image needs.

# %% [markdown]
# ### Build It: class token and positions  ·  easy  ·  about 10 minutes  ·  3 points
#
# Write `add_class_and_positions(patches, class_token, positions)`: `[B, N, D]`, `[D]` and `[1+N, D]` to `[B, 1+N, D]`. The class token comes first and has the first position.
#
# <details><summary>Hint 1</summary>Two steps: put the class token before the patches of every image, then add the positions.</details>
# <details><summary>Hint 2</summary>class_token.expand(B, 1, -1) gives every image its copy, [B, 1, D]; torch.cat joins along dim=1.</details>
# <details><summary>Hint 3</summary>torch.cat([class_token.expand(len(patches), 1, -1), patches], dim=1) + positions</details>

# %% exercise="class_and_positions" twin="vlm_course.vit.add_class_and_positions"
def add_class_and_positions(patches: torch.Tensor, class_token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Class token in front, a position for every token: [B, N, D], [D], [1+N, D] -> [B, 1+N, D]."""
    ### BEGIN SOLUTION
    cls = class_token.expand(len(patches), 1, -1)  # [D] -> [B, 1, D]
    return torch.cat([cls, patches], dim=1) + positions  # [B, 1, D], [B, N, D] -> [B, 1+N, D]
    ### END SOLUTION

# %% check="class_and_positions" points=3
check("class_and_positions", globals())

# %%
add_class_and_positions = part("add_class_and_positions", globals())

def class_vector(patches, positions):
    """What the tower's class token ends as: [B, N, D] -> [B, D]."""
    x = tower.pre_norm(add_class_and_positions(patches, tower.class_token, positions))   # [B, N, D] -> [B, 1+N, D]
    for block in tower.blocks:
        x = block(x)                                                                     # [B, 1+N, D]
    return x[:, 0]

# %% [markdown]
# Do positions matter? Shuffle the patches of eight scenes, with the tower's positions and with none. Without them the class token cannot notice: the image is a bag of patches.

# %% locked="positions"
order = torch.randperm(144, generator=torch.Generator().manual_seed(1))
moved = {}
with torch.inference_mode():
    bags = patchify(encoder_study.lone_objects(8, seed=1).pixels, 8) @ weight.flatten(1).T          # [8, 144, D]
    for name, places in {"no positions": torch.zeros_like(tower.positions), "positions": tower.positions}.items():
        straight, shuffled = class_vector(bags, places), class_vector(bags[:, order], places)
        moved[name] = (straight - shuffled).norm() / straight.norm()
        print(f"{name:13s} shuffling moves the class token by {moved[name]:.2f} of its length")
assert moved["no positions"] < 1e-4 < moved["positions"]

# %% [markdown]
# With positions it *can* tell. How much it makes of them is up to its training: two unrelated directions would be 1.41 apart. Keep the second number in mind; we return to what this tower knows of places.

# %% [markdown] covers=["1-walkthrough-1"]
# ## CLIP ViT-L/14 at 336 pixels, shape by shape
#
# Now the real tower, the one that LLaVA-1.5 reads. On PyTorch's *meta* device a tensor has a shape and no memory, so it is built in a moment. Watch where 576 becomes 577, and where it becomes 576 again.

# %% covers=["1-walkthrough-1"]
from vlm_course.contrastive import ContrastiveModel, TextTower, TextTowerConfig
from vlm_course.llava import LLAVA_7B
from vlm_course.vit import VisionTransformer

texts = TextTowerConfig(vocab_size=49408, width=768, layers=12, heads=12, mlp_width=3072, max_length=77, eos_id=49407)
with torch.device("meta"):
    clip = ContrastiveModel(VisionTransformer(LLAVA_7B.vision), TextTower(texts), embed_dim=768)
    image = torch.empty(1, 3, 336, 336)
large = clip.vision
seen_by_attention = []
hook = large.blocks[0].attention.register_forward_hook(
    lambda module, inputs, output: seen_by_attention.append(inputs[0].shape))

# %% covers=["1-walkthrough-1"]
states = large.hidden_states(image)                      # 25 x [1, 577, 1024]
hook.remove()
rows = {"image": image, "patches, flattened": patchify(image, 14), "after the linear map": large.patch_embedding(image),
        "class token": large.class_token, "positions": large.positions, "into block 1": states[0]}
for name, tensor in rows.items():
    print(f"{name:22s}{list(tensor.shape)}")
print(f"{'attention sees':22s}{list(seen_by_attention[0])}   {large.config.heads} heads, each a table of 577 x 577")
print(f"{'out of block 24':22s}{list(states[24].shape)}   {len(large.blocks)} blocks, {len(states)} hidden states")

# %% covers=["1-walkthrough-1"]
print(f"{'LLaVA takes':22s}{list(large.patch_features(image).shape)}   layer -2, without the class token")
print(f"{'CLIP compares':22s}{list(clip.encode_image(image).shape)}   the class token of the last layer, projected")
parameters = sum(weight.numel() for weight in large.parameters())
print(f"vision tower {parameters:,} parameters, of which positions {large.positions.numel():,}")

# %% [markdown]
# The positions are 577 x 1024, one more than there are patches, and attention runs over 577 tokens. 576 are left only when LLaVA drops the class token. And what CLIP compares with a text has 768 numbers: one token, normed and projected, not a mean of all.

# %% [markdown] covers=["1-idea-2"]
# ## A larger image
#
# Give the tower 672 x 672 pixels. Nothing in the blocks depends on the number of tokens, but the positions do: there are 577 of them, and now 2,305 tokens.

# %% covers=["1-idea-2"]
with torch.device("meta"):
    wide = torch.empty(1, 3, 672, 672)
try:
    large(wide)
except ValueError as error:
    print(error)
print("stretched:", list(large(wide, interpolate=True).shape), " 1 + 48 * 48 =", 1 + 48 * 48)

# %% [markdown]
# Stretching treats the 24 x 24 positions as a picture with 1024 channels and enlarges it to 48 x 48; the class token's own position stays. It runs. Does the tower still see? Try it on the small one, with scenes shown at other sizes: which of 24 captions fits each scene best?

# %%
from vlm_course.worlds import scenes
from vlm_course.worlds.dialogs import Dialogs

dialogs = Dialogs(small.tokenizer)
batch = scenes.sample(64, generator=torch.Generator().manual_seed(11), objects=(2, 6))
pixels = scenes.render(batch, generator=torch.Generator().manual_seed(12))               # [64, 3, 96, 96]
ids = dialogs.contrastive_texts(batch)                                  # [64, T]
with torch.inference_mode():
    captions = small.contrastive.encode_text(ids)                                        # [64, E]
print(small.tokenizer.decode(ids[0]))

# %% covers=["1-idea-2"]
kept = {}
with torch.inference_mode():
    for size in (32, 48, 96, 144):
        view = F.interpolate(pixels[:24], size=(size, size), mode="bicubic", antialias=True)   # [24, 3, size, size]
        pooled = tower.pooled(view, interpolate=True)                                          # -> [24, D]
        images = F.normalize(small.contrastive.image_projection(pooled), dim=-1)               # [24, D] -> [24, E]
        kept[size], _ = encoder_study.recall_at_one(images @ captions[:24].T)
        print(f"{size:4d} px, {(size // 8) ** 2:3d} patches: {kept[size]:.2f} of 24 scenes find their own caption")
print(f"by chance: {1 / 24:.2f}")

# %% [markdown]
# At 48 and at 144 pixels every scene still finds its caption. At 32 some are lost: 16 patches, and few pixels left of each object. One small tower and a plain world prove little about CLIP; there, one fine-tunes after stretching, or cuts the image into tiles of 336.

# %% [markdown] covers=["1-idea-2"]
# ### What grows sixteenfold
#
# Attention compares every token with every token. Twice the side is four times the tokens and sixteen times the pairs. These are *entries of a table*, one for each pair, in each head of each layer. They are not operations, and the table is not all of the tower.

# %% covers=["1-idea-2"]
for size in (336, 672):
    patches = (size // 14) ** 2
    print(f"{size} px: {patches:5,} patches, {patches ** 2:9,} pairs of patches;"
          f" with the class token {encoders.score_entries(patches + 1):9,} entries")
print("ratio of the pairs:", 2304**2 // 576**2)

# %% [markdown] covers=["1-idea-2"]
# ### Derivation: what a vision transformer calculates  ·  medium  ·  about 15 minutes  ·  3 points
#
# Write `vit_flops(tokens, width, layers, mlp_width)`: the operations of the blocks for one image, as two numbers, linear maps and attention between tokens. A multiply-add is two. Leave out norms, biases and the softmax. A block maps D to D four times (query, key, value, output), and D to `mlp_width` and back.
#
# <details><summary>Hint 1</summary>A linear map of N tokens from a to b numbers takes 2 * N * a * b operations: a multiply-add is two.</details>
# <details><summary>Hint 2</summary>A block has six linear maps: query, key, value and output (D to D), and two of the feed-forward net.</details>
# <details><summary>Hint 3</summary>Attention: N * N scores of D products each, over all heads together; the weighted sum takes as many again.</details>

# %% exercise="vit_flops" twin="vlm_course.encoders.vit_flops"
def vit_flops(tokens: int, width: int, layers: int, mlp_width: int) -> tuple[int, int]:
    """Operations of the blocks for one image: (linear maps, attention between tokens)."""
    ### BEGIN SOLUTION
    linear = 2 * tokens * (4 * width * width + 2 * width * mlp_width)
    attention = 2 * 2 * tokens * tokens * width
    return layers * linear, layers * attention
    ### END SOLUTION

# %% check="vit_flops" points=3
check("vit_flops", globals())

# %% covers=["1-idea-2"]
vit_flops = part("vit_flops", globals())
print(f"{'':8s}{'linear':>10s}{'attention':>11s}{'together':>10s}{'share of attention':>20s}   GFLOPs")
totals = {}
for size in (336, 672):
    linear, attention = vit_flops(1 + (size // 14) ** 2, 1024, 24, 4096)
    totals[size] = linear + attention
    print(f"{size:4d} px {linear / 1e9:10,.0f}{attention / 1e9:11,.0f}{totals[size] / 1e9:10,.0f}"
          f"{attention / totals[size]:20.1%}")
ratio = totals[672] / totals[336]
print(f"ratio of the totals: {ratio:.2f}")

# %% [markdown]
# The linear maps grow fourfold, like the tokens; attention grows sixteenfold, but starts at a twelfth of the work. Together about fivefold. Does PyTorch agree, when it counts every operation of the tower itself?

# %% covers=["1-idea-2"]
counted = {}
for view in (image, wide):
    linear, attention = encoders.counted_flops(lambda x: large(x, interpolate=True), view)
    size, embedding = view.shape[-1], 2 * (view.shape[-1] // 14) ** 2 * 588 * 1024
    counted[size] = linear + attention
    print(f"{size} px: counted {counted[size] / 1e9:,.0f} GFLOPs, of which the patch embedding {embedding / 1e9:.1f}; "
          f"the blocks as derived: {counted[size] - embedding == totals[size]}")
reveal("p_1_1", "b", because=f"The whole tower, counted by PyTorch: {counted[672] / counted[336]:.2f} times.")

# %% [markdown] covers=["1-idea-2"]
# This is why models that read large images cut them into tiles: four tiles of 336 pixels cost exactly 4 times one. LLaVA-NeXT (AnyRes) does so, with a small overview as a fifth. Attention then stays inside a tile, but the *language model* still gets the tokens of all tiles. Nothing is free; chapter 8 counts it.

# %%
linear, attention = vit_flops(577, 1024, 24, 4096)
tiles = 4 * (linear + attention)
print(f"four tiles of 336 px: {tiles / totals[336]:.1f} times one image; one image of 672 px: {ratio:.2f} times")

# %% [markdown] covers=["1-simulation-1"]
# ## Simulation: image patchification
#
# A photograph and a scene, cut for CLIP ViT-L at any size and patch. The second picture is a detail as pixels. The third is the same detail after each patch went through one linear map to 1,024 numbers and back: not CLIP's own map, but one that suits pictures, the smoothest cosine waves.

# %% covers=["1-simulation-1"]
from vlm_course.simulations.image_patchification import patchification_simulation

simulation = patchification_simulation(image_size=672, patch_size=14)
simulation.first_frame()

# %% [markdown]
# Read the bars: at 672 pixels the light part, linear maps, is still most of the work. Now find a setting whose third picture is visibly worse than its second; and two settings with the same number of patches but different details.

# %% tags=["nbval-ignore-output"] covers=["1-simulation-1"]
simulation

# %% [markdown] covers=["1-idea-3"]
# ## The trade-off of patch size
#
# Smaller patches: more tokens, so more work, in the tower and in the language model behind it. Larger patches: more pixels for each vector to hold. CLIP L/14 at 336 pixels is one point on this line, of 2021. Here is the line.

# %% covers=["1-idea-3"]
print(f"{'patch':>6s}{'tokens':>8s}{'values':>8s}{'per number':>12s}{'GFLOPs':>9s}   at 336 px")
for patch in (7, 14, 16, 28, 42, 56):
    budget = encoders.patch_budget(336, patch, 1024)
    work = sum(vit_flops(1 + budget["tokens"], 1024, 24, 4096)) / 1e9
    print(f"{patch:6d}{budget['tokens']:8,}{budget['values']:8,}{budget['values_per_number']:12.2f}{work:9,.0f}")

# %% [markdown]
# Below 1 value per number a linear map can keep every pixel: at 14 x 14 with 588 values in 1,024 numbers, nothing *need* be lost in the first step. Above 1, something must be. What is lost later, in 24 blocks, this count does not say.

# %% [markdown] covers=["1-checkpoint-1"]
# ### Checkpoint: tokens and what each has to hold  ·  easy  ·  about 8 minutes  ·  2 points
#
# An image of 672 x 672 pixels, a tower of width 1024. How many tokens do patches of 14 make? What changes with patches of 28? Write `patch_budget(image_size, patch_size, width)`, which answers for any numbers: a dict with `tokens`, `pixels` and `values` of one patch, and `values_per_number`.
#
# <details><summary>Hint 1</summary>Count the patches along one side first; the image is square.</details>
# <details><summary>Hint 2</summary>A patch of p x p pixels has p * p pixels and three values for each of them: red, green, blue.</details>
# <details><summary>Hint 3</summary>values_per_number is values / width, a float: above 1, a linear map has to drop something.</details>

# %% exercise="patch_budget" twin="vlm_course.encoders.patch_budget" covers=["1-checkpoint-1"]
def patch_budget(image_size: int, patch_size: int, width: int) -> dict[str, int | float]:
    """Patches of a square image, pixels and values in one, and values for each number of a token."""
    ### BEGIN SOLUTION
    tokens = (image_size // patch_size) ** 2
    pixels = patch_size * patch_size
    values = 3 * pixels
    return {"tokens": tokens, "pixels": pixels, "values": values, "values_per_number": values / width}
    ### END SOLUTION

# %% check="patch_budget" points=2 covers=["1-checkpoint-1"]
check("patch_budget", globals())

# %% covers=["1-checkpoint-1"]
patch_budget = part("patch_budget", globals())
for patch in (14, 28):
    budget = patch_budget(672, patch, 1024)
    print(f"672 px, patches of {patch}: " + ", ".join(f"{name} {value:,.3g}" if name == "values_per_number"
                                                    else f"{name} {value:,}" for name, value in budget.items()))

# %% [markdown] covers=["1-checkpoint-1"]
# 2,304 tokens of width 1024, or 576. A patch of 28 has 784 pixels and 2,352 values, four times as many as one of 14. Only the larger patch is *compressed*: 2,352 values do not fit into 1,024 numbers, 588 do. And against 336 pixels, patches of 14 cost the tower about 5 times the work, not 16. We know of no published CLIP with patches of 28.

# %% [markdown] covers=["1-table-1"]
# ## Four encoders, and the one that is often mixed up
#
# Which towers do vision-language models read? Each is built by timm or transformers on the meta device, sent one image of zeros, and counted. Sizes and widths below are counted; "used by" has its source under the table.

# %% covers=["1-table-1"]
print(f"{'tower':22s}{'parameters':>15s}{'width':>7s}{'layers':>8s}{'pixels':>8s}{'patches':>9s}{'extra':>7s}{'GFLOPs':>9s}")
for encoder in encoders.ENCODERS:
    found = encoders.measure(encoder)
    print(f"{encoder.name:22s}{found.parameters:15,}{found.width:7,}{found.layers:8d}{found.image_size:8d}"
          f"{found.patches:9,}{found.extra_tokens:7d}{found.flops / 1e9:9,.0f}")

# %% covers=["1-table-1"]
from IPython.display import Markdown

Markdown("\n".join(f"- **{row.name}**, trained to {row.training}; read by {row.used_by}. Source: {row.source} "
                   f"(checked {row.checked})." for row in encoders.ENCODERS))

# %% [markdown] covers=["1-table-1"]
# All have patches of 14; "extra" is the class token, which SigLIP does without. Two corrections. InternVL does not read EVA's 1.0B ViT-g: its authors trained InternViT, 5.9 billion parameters and 3,200 wide. ViT-g is what BLIP-2 reads, without its last layer.

# %% [markdown]
# SigLIP's 428 million hold an attention pooling of 15 million at the end, which a VLM does not need: it takes the patches. And patches of 14 at 224 or 336 pixels were the habit of 2023. Later models go to 384, to tiles of 448, or to the image's own size (chapters 8 and 9).

# %% [markdown] covers=["1-pattern-1"]
# ## How CLIP learns to see
#
# No labels: pairs of an image and its caption. A second tower reads the caption. Both end in one vector, brought to length 1. In a batch of B pairs every image is compared with every caption, and each has to find its own. A toy batch of three:

# %%
cosines = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.8, 0.1], [0.0, 0.4, 0.7]])   # rows images, columns captions
for scale in (0.0, 1.0, 14.3, 100.0):
    shares = (scale * cosines).softmax(dim=1)                                 # each image chooses among the captions
    lost = abs(shares.diagonal().log().mean())                                # -ln(share), and no -0.000
    print(f"cosines times {scale:5.1f}: image 0 gives its own caption {shares[0, 0]:.2f}, mean loss {lost:.3f}")
print(f"ln 3 = {torch.tensor(3.0).log():.3f}")

# %% [markdown]
# Cosines lie between -1 and 1, too close together for a sharp choice, so they are multiplied by a learned factor. CLIP learns its *logarithm*, starts at ln(1 / 0.07), a factor of 14.3, and never lets the factor exceed 100. With factor 0 nothing is known, and the loss is ln 3.

# %% [markdown] covers=["1-pattern-1"]
# ### Build It: the logits of CLIP  ·  medium  ·  about 10 minutes  ·  3 points
#
# Write `contrastive_logits(images, captions, logit_scale)`: the cosine of every image `[B, E]` with every caption `[B', E]`, times the factor. Vectors come in any length. `logit_scale` is the factor's logarithm; `MAX_LOGIT_SCALE` is ln 100.
#
# <details><summary>Hint 1</summary>A cosine is the dot product of two vectors of length 1. F.normalize(x, dim=-1) makes them so.</details>
# <details><summary>Hint 2</summary>One matrix product gives all pairs: [B, E] x [E, B']. The scale is learned as a logarithm.</details>
# <details><summary>Hint 3</summary>F.normalize both; logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * images @ captions.T</details>

# %% exercise="contrastive_logits" twin="vlm_course.contrastive.contrastive_logits"
def contrastive_logits(images: torch.Tensor, captions: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Scaled cosines of all pairs: [B, E], [B', E], [] -> [B, B'], rows are images."""
    ### BEGIN SOLUTION
    images, captions = F.normalize(images, dim=-1), F.normalize(captions, dim=-1)
    scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    return scale * images @ captions.T  # [B, E] x [E, B'] -> [B, B']
    ### END SOLUTION

# %% check="contrastive_logits" points=3
check("contrastive_logits", globals())

# %% [markdown] covers=["1-pattern-1"]
# ### Build It: the contrastive loss  ·  medium  ·  about 10 minutes  ·  3 points
#
# Write `contrastive_loss(logits)`: `[B, B]` to one number. Every image chooses among the captions, every caption among the images; pair i sits on the diagonal. The loss is the mean of the two cross-entropies.
#
# <details><summary>Hint 1</summary>Each row is a choice: which of B captions belongs to this image? The right one is on the diagonal.</details>
# <details><summary>Hint 2</summary>F.cross_entropy(logits, torch.arange(B)) does the rows. What does it do to logits.T?</details>
# <details><summary>Hint 3</summary>(F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2</details>

# %% exercise="contrastive_loss" twin="vlm_course.contrastive.contrastive_loss"
def contrastive_loss(logits: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy over a batch of pairs: [B, B] -> []."""
    ### BEGIN SOLUTION
    pairs = torch.arange(len(logits), device=logits.device)
    image_to_text = F.cross_entropy(logits, pairs)  # [B, B] -> []
    text_to_image = F.cross_entropy(logits.T, pairs)  # [B, B] -> []
    return (image_to_text + text_to_image) / 2
    ### END SOLUTION

# %% check="contrastive_loss" points=3
check("contrastive_loss", globals())

# %%
contrastive_logits = part("contrastive_logits", globals())
contrastive_loss = part("contrastive_loss", globals())
with torch.inference_mode():
    pooled = tower.pooled(pixels)                                            # [64, 3, 96, 96] -> [64, D]
    images = small.contrastive.image_projection(pooled)                      # [64, D] -> [64, E]
    logits = contrastive_logits(images, captions, small.contrastive.logit_scale)   # [64, E], [64, E] -> [64, 64]
print(f"loss of the shipped towers over 64 pairs: {contrastive_loss(logits):.2f}; knowing nothing, ln 64 = 4.16")
print(f"with the captions exchanged: {contrastive_loss(logits.roll(1, dims=1)):.1f}")
print(f"learned factor: {small.contrastive.logit_scale.exp():.0f}")

# %% [markdown]
# SigLIP asks otherwise: every pair is its own yes-or-no question, without a softmax over the batch. One pair alone shows the difference. CLIP's loss has nothing to choose from and is zero; SigLIP's still says whether the two fit. (Factor 10 and bias -10 are where SigLIP's training starts.)

# %%
from vlm_course.contrastive import sigmoid_loss

for name, cosine in (("fits", 1.0), ("does not fit", -1.0)):
    one = torch.tensor([[10.0 * cosine]])                                    # one image, one caption: [1, 1]
    print(f"a pair that {name}: CLIP's loss {contrastive_loss(one):.2f}   SigLIP's {sigmoid_loss(one - 10):.2f}")

# %% [markdown] covers=["1-pattern-1"]
# ## One vector, or one for each patch
#
# CLIP uses one output of its vision tower, the class token; LLaVA uses all others. The same tower, two ways to read it. What can be read from each? First the one vector: find the caption among 64, and name an object that stands alone, by comparing it with every "colour shape".

# %% covers=["1-pattern-1"]
from vlm_course.simulations.shared_space import untrained

with torch.inference_mode():
    fresh = untrained(small.contrastive)
    control = contrastive_logits(fresh.encode_image(pixels[:32]), fresh.encode_text(ids[:32]), fresh.logit_scale)
for name, table in {"trained, 64 pairs": logits, "untrained, 32 pairs": control}.items():
    found = encoder_study.recall_at_one(table)
    print(f"{name:20s} image finds caption {found[0]:.2f}   caption finds image {found[1]:.2f}   by chance {1 / len(table):.2f}")

# %%
from vlm_course.chat import pad_rows

def read(texts):
    """Captions -> unit vectors [n, E]."""
    rows = [[small.tokenizer.bos_id, *small.tokenizer.encode(text), small.tokenizer.eos_id] for text in texts]
    with torch.inference_mode():
        return small.contrastive.encode_text(pad_rows(rows, small.tokenizer.pad_id)[0])

lone = encoder_study.lone_objects(120, seed=5)                               # one object in each scene
with torch.inference_mode():
    states = tower.hidden_states(lone.pixels)                                # 7 x [120, 1+N, D]
    vectors = tower.post_norm(states[-1][:, 0])                              # [120, 1+N, D] -> [120, D]
    images = F.normalize(small.contrastive.image_projection(vectors), dim=-1)      # [120, D] -> [120, E]

# %% covers=["1-pattern-1"]
names = [(colour, shape) for colour in scenes.COLOURS for shape in scenes.SHAPES]
for template in ("a {} {}", "a picture of a {} {}"):
    best = (images @ read([template.format(*name) for name in names]).T).argmax(1)             # [120, E] x [E, n]
    colour, shape = best // len(scenes.SHAPES), best % len(scenes.SHAPES)
    right_colour = (colour == lone.of(lone.scenes.colour)).float().mean()
    right_shape = (shape == lone.of(lone.scenes.shape)).float().mean()
    print(f"{template.format('red', 'star'):24s} colour right {right_colour:.2f}   shape right {right_shape:.2f}")
print(f"{len(names)} names; by chance {1 / len(scenes.COLOURS):.2f} and {1 / len(scenes.SHAPES):.2f}")

# %% [markdown]
# That is zero-shot classification: no classifier was trained, the names are the classifier. How they are worded matters, for CLIP too (Radford et al. 2021, section 3.1.4): a longer frame that training never used costs this tower a good part.

# %% [markdown] covers=["1-pattern-1"]
# Now the *place*. The captions of the training name the row and the column of every object. Does the vector know them? Ask with nine captions that differ in the place alone; and fit a linear map from the vector to the object's centre.

# %% covers=["1-pattern-1"]
places = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]
objects = [lone.scenes.describe(i)[0] for i in range(50)]
nine = read([f"{thing} {place}," for thing in objects for place in places]).view(50, 9, -1)    # [50, 9, E]
told = torch.einsum("ie,ike->ik", images[:50], nine).argmax(1) == lone.of(lone.scenes.cell)[:50]
told = told.float().mean()
print(f"right place of nine, by captions: {told:.2f}   by chance {1 / 9:.2f}")

# %% locked="place" covers=["1-pattern-1"]
train = 80                                               # scenes that fit the map; the other 40 judge it
fixed_guess = encoder_study.error_of_the_mean(lone.centre, train=train)
from_vector = encoder_study.error_of_vectors(vectors, lone.centre, train=train)
from_patches = encoder_study.error_of_tokens(states[-2][:, 1:], lone, train=train, patch_size=8)
print(f"distance to the true centre, in pixels of 96: one vector {from_vector:.1f}, patches {from_patches:.1f}, "
      f"a fixed guess {fixed_guess:.1f}")
assert from_patches < 6 and 2 * from_patches < from_vector < 0.6 * fixed_guess and told > 0.6

# %%
letter = "c" if from_vector > 0.9 * fixed_guess else "b" if from_vector > 2 * from_patches else "a"
reveal("p_1_3", letter, because=f"{from_vector:.1f} pixels from the vector, {from_patches:.1f} from the patches, "
                                f"{fixed_guess:.1f} from a fixed guess.")

# %% [markdown]
# The patches give the place to less than their own width, because they stand in order: a map with 192 weights says which of them lie in the object. The one vector knows the place roughly: the captions name one place of nine, so matching needs that, and no more.

# %% [markdown] covers=["1-pattern-1"]
# So a VLM takes all patches because it needs to know where things are. The lesson adds that pooling at the end *destroys* this, and that the layer before the last is used to come before it. That part can be tested: does the last layer's row of patches tell less?

# %% covers=["1-pattern-1"]
for layer in (-1, -2, -3, -5, -7):
    error = encoder_study.error_of_tokens(states[layer][:, 1:], lone, train=train, patch_size=8)
    print(f"layer {layer}: {error:.1f} pixels")

# %% [markdown]
# The last layer has its patches like any other, and the place can still be read from them. Nothing was pooled: CLIP's image vector is the class token alone. So why did LLaVA take the layer before? Its authors tried both and kept the better one. A clean difference between the two does exist.

# %% [markdown] covers=["1-pattern-1"]
# ## Which outputs does the loss train?
#
# Follow the gradient. For 32 pairs, how strongly does the contrastive loss pull at each hidden state, at the class token and at the patches? Lengths are relative to the class token of the last layer.

# %% covers=["1-pattern-1"]
pulls = encoder_study.state_gradients(small.contrastive, pixels[:32], ids[:32])
scale = pulls[-1].class_token
for layer, pull in enumerate(pulls):
    where = "into block 1" if layer == 0 else f"out of block {layer}"
    print(f"{where:15s} class token {pull.class_token / scale:.2f}   patches {pull.patches / scale:.2g}")
assert pulls[-1].patches == 0 < pulls[-2].patches
reveal("p_1_2", "c", because="At the last layer's patches the gradient is 0, exactly; one layer earlier it is not.")

# %% [markdown]
# Exactly zero, and it must be: the loss reads the last class token, and nothing comes after in which patches could speak to it. The patches of layer -2 are different. They are keys and values of the last block, so they are trained to be *read*.

# %% [markdown]
# Zero gradient does not make them noise: most of a patch's vector is carried through the last block unchanged, and the block's weights are trained by way of the class token. How much worse the last layer is for a VLM is a matter of measuring. For places, ours shows hardly any difference. Chapter 5 trains bridges on layers -1, -2, -3 and an early one.

# %% [markdown] covers=["1-pattern-1"]
# ### Build It: penultimate features  ·  medium  ·  about 15 minutes  ·  4 points
#
# Write `select_features(states, layer, strategy)`. `states` are the layers+1 hidden states, `states[0]` the input of block 1. `layer` is a number, or a list of numbers whose features are joined along the width. Strategy "default" drops the class token, "full" keeps it. No norm.
#
# <details><summary>Hint 1</summary>states[layer] is already the right tensor for one layer: states[0] is what enters the first block.</details>
# <details><summary>Hint 2</summary>The class token is token 0, along dimension 1. "default" drops it, "full" keeps it.</details>
# <details><summary>Hint 3</summary>Make a list of layers in any case, torch.cat along dim=-1, then [:, 1:] for the default.</details>

# %% exercise="select_features" twin="vlm_course.vit.select_features"
def select_features(states: list[torch.Tensor], layer: int | list[int] = -2, strategy: str = "default") -> torch.Tensor:
    """What a language model gets: [B, N, k*D] of k layers, with the class token [B, 1+N, k*D] for "full"."""
    ### BEGIN SOLUTION
    layers = [layer] if isinstance(layer, int) else layer
    features = torch.cat([states[index] for index in layers], dim=-1)  # k x [B, 1+N, D] -> [B, 1+N, k*D]
    return features[:, 1:] if strategy == "default" else features  # [B, 1+N, k*D] -> [B, N, k*D]
    ### END SOLUTION

# %% check="select_features" points=4
check("select_features", globals())

# %% [markdown]
# ### Your functions are the model's eyes
#
# `patchify`, the class token and positions, the choice of features: put together they are the vision tower, but for its blocks. Fill in the trained numbers, and let the small VLM answer with what *your* tower sees.

# %%
select_features = part("select_features", globals())

def see(pixels):
    """Images [B, 3, 96, 96] -> features [B, N, D], by the functions of this chapter."""
    patches = patchify(pixels, 8) @ tower.patch_embedding.weight.flatten(1).T               # -> [B, N, D]
    states = [tower.pre_norm(add_class_and_positions(patches, tower.class_token, tower.positions))]
    for block in tower.blocks:
        states.append(block(states[-1]))                                                    # [B, 1+N, D]
    return select_features(states, -2, "default")                                           # -> [B, N, D]

# %%
from vlm_course.chat import encode_chat
from vlm_course.generation import generate

with torch.inference_mode():
    features = see(pixels[:2])                                                              # [2, N, D]
    print("as the package's tower:", torch.allclose(features, tower.patch_features(pixels[:2]), atol=1e-4))
    for row, name in ((0, "what it saw"), (1, "another scene")):
        prompt, _ = encode_chat(small.tokenizer, [("describe the image.", None)], visual_tokens=144)
        answer = generate(small.model, torch.tensor([prompt]), image_features=small.model.bridge(features[row:row + 1]),
                          max_new_tokens=40, eos_id=small.tokenizer.eos_id)
        print(f"{name}: {small.tokenizer.decode(answer[0])}")
print("true:", ", ".join(batch.describe(0)))

# %% folded=true
figure, axes = figures.axes(1, 2, width=4.4, height=2.3)
for row, axis in enumerate(axes):
    figures.draw_scene(axis, pixels[row], ("what it saw", "another scene")[row])
figures.show(figure, "Two scenes of the course's world. Left: " + ", ".join(batch.describe(0)) + ". Right: "
             + ", ".join(batch.describe(1)) + ".")

# %% [markdown] covers=["1-pattern-2"]
# ### Think: one encoder, different amounts of its output
#
# CLIP reads one token of the last layer; LLaVA reads all but one of the layer before. Where else do you know one encoder that is used with different amounts of its output? Think of hidden states at every layer, and of text models. Write down two before you open ours.
#
# <details><summary>Our answer</summary>
#
# - One token or all, in text: BERT's class token for a sentence, every token for tagging; one mean vector for search (Reimers and Gurevych 2019, section 3), or every token's vector, as ColBERT does (Khattab and Zaharia 2020, section 3).
# - Many layers: ELMo mixes all layers with learned weights (Peters et al. 2018, section 3.2); ViP-LLaVA joins several layers of CLIP along the width, which your `select_features` does with a list.
# - One tower, two tasks: DINOv2's class token classifies images, its patches segment them (Oquab et al. 2023, section 7).
# - CLIP's *text* tower: CLIP reads one token of it, Stable Diffusion all 77; its second version takes the penultimate layer.
#
# The pattern: a loss that reads one output shapes that output; whoever wants the rest has to look where it is still trained, and measure. (These examples are from memory.)
# </details>

# %% [markdown]
# ## Where it fails
#
# Two objects, and a false caption in which they have exchanged one property. Does the true caption win? And does it still, when it names the same two objects in the other order? Training always named them in reading order. By chance it is half.

# %% locked="failure"
two = scenes.sample(48, generator=torch.Generator().manual_seed(31), objects=(2, 2))
with torch.inference_mode():
    shown = small.contrastive.encode_image(scenes.render(two, generator=torch.Generator().manual_seed(32)))   # [48, E]
named = [encoder_study.placed_objects(two, i) for i in range(48)]
true, reordered = ((shown * read([" ".join(objects[::step]) for objects in named])).sum(1) for step in (1, -1))
wins = []
for kind in ("colour", "shape", "size", "place"):
    other, rows = encoder_study.exchanged(two, kind)
    false = (shown * read([" ".join(encoder_study.placed_objects(other, i)) for i in range(48)])).sum(1)      # [48]
    wins.append([(score > false)[rows].float().mean().item() for score in (true, reordered)])
    print(f"{kind:7s} exchanged: true caption wins {wins[-1][0]:.2f}, in the other order {wins[-1][1]:.2f} of {len(rows)}")
assert all(usual > 0.8 and other < 0.75 for usual, other in wins)

# %% [markdown]
# The other order says the same, and for this tower it fits no better than a lie. It learned its captions' form along with their content. CLIP has gaps of this kind: it often cannot tell a caption from one with exchanged words (Yuksekgonul et al. 2023, section 2). A VLM that reads patches does not inherit the text tower; it inherits only what the patches know.

# %% [markdown] covers=["1-check-1"]
# ## Check question
#
# Choose on the buttons to read the reason for each option, then return your letter below: that is the answer that counts.

# %% covers=["1-check-1"]
question("q_1_1")

# %% exercise="q_1_1"
def q_1_1() -> str:
    """Return the letter of your answer."""
    ### BEGIN SOLUTION
    return "d"
    ### END SOLUTION

# %% check="q_1_1" points=1 covers=["1-check-1"]
check("q_1_1", globals())

# %% [markdown]
# ## Claims of the chapter
#
# What the source lesson says, in our words, what is true, and the section of this chapter that shows it. The last column says how strong the evidence is.

# %%
from vlm_course.claims import claim_table

claim_table(1)

# %% [markdown]
# ## What you built, and where it lives
#
# | you wrote | in the package | in real systems |
# |---|---|---|
# | `patchify` | `vlm_course/patches.py` | the strided convolution of every ViT |
# | `add_class_and_positions`, `select_features` | `vlm_course/vit.py` | `CLIPVisionEmbeddings`; LLaVA's `vision_feature_layer` |
# | `contrastive_logits`, `contrastive_loss` | `vlm_course/contrastive.py` | CLIP, OpenCLIP |
# | `vit_flops`, `patch_budget` | `vlm_course/encoders.py` | the budget of any tower |

# %% [markdown]
# ## What to read next
#
# - Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1 (patches, class token) and 3.2 (stretching positions).
# - Radford et al. 2021, CLIP, sections 2.3 to 2.5, and figure 3: the loss in nine lines.
# - Zhai et al. 2023, SigLIP, section 3: why no softmax.
# - Liu et al. 2023, LLaVA, section 4.1: all patches, before and after the last layer.
# - Darcet et al. 2024, "Vision Transformers Need Registers": what towers do with patches that they do not need.

# %% [markdown]
# A tower hands over 576 vectors of width 1024. A language model wants another width and another meaning. Chapter 2 builds the bridge.
