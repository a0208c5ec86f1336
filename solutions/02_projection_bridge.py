# %% [markdown] covers=["2-idea-1"]
# # Chapter 2: The projection bridge
#
# A vision tower speaks in vectors, and so does a language model, but not in the same ones. This chapter builds the small network between the two, counts it to the last parameter, and breaks it by degrees to see what it does.

# %% [markdown]
# **By the end you can**
#
# - show why visual features cannot be joined to word embeddings as they are;
# - derive the size of LLaVA-1.5's bridge, 7B and 13B, and its share of the model;
# - write that bridge, and a resampler that turns 576 features into 64;
# - compare four bridges by parameters, tokens, work and loss of detail.

# %%
from vlm_course.build.costs import measured

print("Reading and doing: about 100 minutes, 45 more for the bonus.")
print(measured("02_projection_bridge"))

# %% [markdown]
# You need PyTorch's `nn.Module` and the idea of a matrix product. Chapter 1 is useful, not required: here the vision tower is a box that turns an image into *N* vectors of width *D*.

# %% locked="imports"
import torch
from torch import nn

from vlm_course import bridge_study, bridges, chat, generation
from vlm_course.attention import attend
from vlm_course.catalog import models as catalog
from vlm_course.grading import check, part, question
from vlm_course.llava import LLAVA_7B, LLAVA_13B, Llava
from vlm_course.progress import predict, reveal
from vlm_course.simulations import figures

# %% [markdown]
# ## Predict first
#
# Three questions before anything runs. Choose an answer and say how sure you are. Nobody else sees it: your answers stay in a file on this computer, and the last chapter shows how well your confidence matched your hits.

# %%
predict("p_2_1", "How many parameters does the bridge of LLaVA-1.5 13B have, compared with that of the 7B?",
        {"a": "exactly as many", "b": "1.5 times as many", "c": "almost twice as many, like the models"})

# %%
predict("p_2_2", "We turn every visual token by 90 degrees. Lengths, distances and angles among the tokens stay. "
        "The model's answers ...", {"a": "stay as good: no information is lost", "b": "get somewhat worse",
                                    "c": "get as bad as answers about another image, or worse"})

# %%
predict("p_2_3", "A visual token comes from inside a red star. The word embedding nearest to it, by cosine, is ...",
        {"a": "red or star, in most such cases", "b": "red or star more often than by chance, in fewer than half",
         "c": "red or star no more often than by chance"})

# %% [markdown] covers=["2-idea-1", "2-idea-4"]
# ## Two spaces that do not fit
#
# CLIP ViT-L/14 gives 1024 numbers for a patch. Vicuna-7B reads 4096 numbers for a word. A language model takes one sequence, so patches and words must stand in one tensor. Try it.

# %% covers=["2-idea-4"]
patches = torch.randn(576, 1024)  # [N, D_vision], the shape of CLIP's features
words = torch.randn(50, 4096)     # [T, D_llm], the shape of Vicuna-7B's word embeddings
try:
    torch.cat([patches, words])
except RuntimeError as error:
    print(error)

# %% [markdown]
# That is the visible half of the problem: the widths differ. The other half is invisible. Make the widths equal in the cheapest way, by filling up with zeros, and PyTorch no longer objects. Does the model understand?

# %% [markdown]
# Ask the model that comes with this course. It is a small LLaVA: 144 patches of width 192, word embeddings of width 256, really trained. Six kinds of question about sixteen scenes that it never saw are its exam in this chapter. (Its little world writes American English.)

# %%
from vlm_course.pretrained import load_small
from vlm_course.probe_questions import question_set, score

small = load_small()
exam = question_set(small.tokenizer, scenes=16)
print("images", tuple(exam.pixels.shape), " questions about scene 0:")
print("\n".join(exam.texts[0]))

# %%
figure, axes = figures.axes(1, 4, width=7, height=1.9)
for row, axis in enumerate(axes):
    figures.draw_scene(axis, exam.pixels[row])
content = "; ".join(", ".join(exam.scenes.describe(row)) for row in range(4))
figures.show(figure, f"Four scenes of the exam: {content}.")

# %% [markdown]
# The exam with the trained bridge, and with features merely padded to the right width. Two controls say what the world gives away without this image: the tokens of *another* scene, and always giving the most frequent answer. Boxes come later.

# %%
with torch.no_grad():
    features = small.model.vision.patch_features(exam.pixels)  # [B, 3, 96, 96] -> [B, N, 192]
    tokens = small.model.bridge(features)                      # [B, N, 192] -> [B, N, 256]
padded = nn.functional.pad(features, (0, 256 - 192))           # [B, N, 192] -> [B, N, 256]

results = {"trained bridge": tokens, "padded with zeros": padded, "another scene": tokens.roll(1, dims=0)}
for name, visual in results.items():
    result = score(small.model, exam, visual)
    print(f"{name:18s} exact answers {result.accuracy():.2f}   loss {result.loss:.2f} nats a token")
print(f"{'most frequent':18s} exact answers {exam.majority():.2f}")

# %% [markdown]
# Padded features do no better than the controls: the code runs, and nothing of this image arrives. Equal widths do not make numbers mean anything. A bridge has to do both: fit, and be understood.

# %% [markdown]
# ## A bridge of three numbers
#
# Shrink the problem until it fits on a line. One patch, described by three numbers; a language model that reads two. A linear bridge is one weighted sum for each number that the reader expects.

# %%
patch = [0.2, 0.9, 0.1]                       # say: round, furry, bright
weights = [[1.0, 0.0, 0.5], [0.0, 2.0, -1.0]]  # a row for each number of the answer
bias = [0.1, -0.2]

token = []
for row, start in zip(weights, bias, strict=True):
    total = start
    for weight, value in zip(row, patch, strict=True):
        total = total + weight * value
    token.append(round(total, 2))
print(token)

# %% [markdown]
# Two rows of three weights, two biases: 8 numbers to learn. PyTorch writes the two loops as one product, and does the same to every patch of every image at once.

# %%
linear = nn.Linear(3, 2)
with torch.no_grad():
    linear.weight.copy_(torch.tensor(weights))  # [D_llm, D_vision]
    linear.bias.copy_(torch.tensor(bias))
image = torch.tensor([[patch, [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])  # [B, N, D_vision] = [1, 3, 3]
made = linear(image)  # [B, N, D_vision] -> [B, N, D_llm] = [1, 3, 2]
for row in made[0].tolist():
    print([round(value, 2) for value in row])

# %% [markdown]
# The first row is the loop's answer. The second patch is all zeros and gives the bias. No patch looks at another: exchange two patches and their tokens change places, nothing else.

# %% [markdown]
# ### Why a second layer needs a bend between
#
# LLaVA-1.5 stacks two linear layers. Two stacked linear layers alone are only one: the product of their matrices does the same. The GELU between them is what makes the second layer worth having.

# %%
torch.manual_seed(0)
first, second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
with torch.no_grad():
    merged = image @ (second.weight @ first.weight).T  # [1, 3, 3] x [3, 2] -> [1, 3, 2]
    straight = second(first(image))                    # [1, 3, 3] -> [1, 3, 4] -> [1, 3, 2]
    bent = second(nn.functional.gelu(first(image)))    # the same with GELU between
print("two layers are one matrix:", torch.allclose(straight, merged, atol=1e-6))
print("with GELU between:        ", torch.allclose(bent, merged, atol=1e-6))

# %% [markdown] covers=["2-walkthrough-1"]
# ## LLaVA-1.5's bridge, shape by shape
#
# The real one, built on PyTorch's *meta* device: shapes and counts without memory. Both layers end at the width of the language model, the first one too.

# %% covers=["2-walkthrough-1"]
for size, width in (("7B", 4096), ("13B", 5120)):
    with torch.device("meta"):
        bridge, x = bridges.VisionProjection(1024, width), torch.empty(1, 576, 1024)
    print(f"LLaVA-1.5 {size}: features {list(x.shape)}")
    for layer in bridge.mlp:
        x = layer(x)  # [1, 576, 1024] -> [1, 576, D_llm], and once more
        print(f"   {type(layer).__name__:6s} -> {list(x.shape)}   {bridge_study.count_parameters(layer):,} parameters")

# %% [markdown] covers=["2-derivation-1"]
# ### Derivation: the parameters of the bridge  ·  easy  ·  about 10 minutes  ·  3 points
#
# Write `projection_parameters(vision_dim, llm_dim)`: how many parameters do Linear(vision_dim, llm_dim), GELU, Linear(llm_dim, llm_dim) have, with biases? The check draws widths of its own, so only the formula passes.
#
# <details><summary>Hint 1</summary>nn.Linear(n_in, n_out) holds a weight for each pair of input and output, and a bias for each output.</details>
# <details><summary>Hint 2</summary>GELU has no parameters. The two linear maps are vision_dim to llm_dim and llm_dim to llm_dim.</details>
# <details><summary>Hint 3</summary>First layer: vision_dim * llm_dim + llm_dim. The second is the same with llm_dim in both places.</details>

# %% exercise="projection_parameters" twin="vlm_course.costs.projection_parameters" covers=["2-derivation-1"]
def projection_parameters(vision_dim: int, llm_dim: int) -> int:
    """Parameters of Linear(vision_dim, llm_dim), GELU, Linear(llm_dim, llm_dim)."""
    ### BEGIN SOLUTION
    first = vision_dim * llm_dim + llm_dim
    second = llm_dim * llm_dim + llm_dim
    return first + second
    ### END SOLUTION

# %% check="projection_parameters" points=3 covers=["2-derivation-1"]
check("projection_parameters", globals())

# %% covers=["2-derivation-1"]
projection_parameters = part("projection_parameters", globals())
count_7b, count_13b = projection_parameters(1024, 4096), projection_parameters(1024, 5120)
print(f"7B:  {1024 * 4096 + 4096:,} + {4096 * 4096 + 4096:,} = {count_7b:,}")
print(f"13B: {1024 * 5120 + 5120:,} + {5120 * 5120 + 5120:,} = {count_13b:,}")
reveal("p_2_1", "b", because=f"{count_13b:,} / {count_7b:,} = {count_13b / count_7b:.2f}.")

# %% [markdown]
# The counts are those of the layers above, added. From 7B to 13B the second matrix grows with the square of the width, the first with the width alone: together a factor of 1.5. The language model grows faster; you will count it in a moment.

# %% [markdown] covers=["2-derivation-1"]
# ## Which width is the language model's?
#
# The source lesson gives the 13B model an output of 4096, and takes 5120 for the width *inside* its feed-forward layers. A model that can be built can be asked. Both real configurations, on the meta device:

# %% covers=["2-derivation-1", "2-walkthrough-1"]
with torch.device("meta"):
    llava_7b, llava_13b = Llava(LLAVA_7B), Llava(LLAVA_13B)
for name, model in (("7B", llava_7b), ("13B", llava_13b)):
    decoder = model.decoder
    print(f"{name}:  word embeddings {list(decoder.token_embedding.weight.shape)}   ",
          f"hidden width {decoder.blocks[0].attention.query.in_features}   ",
          f"inside the feed-forward {decoder.blocks[0].mlp.gate.out_features}")

# %% [markdown]
# A Llama decoder has one width outside its layers: an embedding enters the first block as it is. For 13B that is 5120; the feed-forward layers inside are 13,824 wide. (The tables have 64 rows more than Vicuna's 32,000 word pieces: room for `<image>` and padding.) So 4096 belongs to the 7B model, and a bridge that ends there does not fit 13B:

# %% covers=["2-derivation-1"]
tokens_7b = torch.empty(576, 4096, device="meta")  # what a bridge ending at 4096 hands over
words_13b = torch.empty(50, 5120, device="meta")   # [T, D_llm] of the 13B model
try:
    torch.cat([tokens_7b, words_13b])
except RuntimeError as error:
    print(error)

# %% [markdown] covers=["2-idea-2"]
# ## How small is the bridge?
#
# ### Derivation: the bridge's share  ·  easy  ·  about 5 minutes  ·  2 points
#
# Write `projection_share(vision_dim, llm_dim, llm_parameters)`: the parameters of the bridge divided by those of the language model, as a fraction.
#
# <details><summary>Hint 1</summary>You know how many parameters the bridge has; llm_parameters says how many the language model has.</details>
# <details><summary>Hint 2</summary>The answer is a fraction such as 0.0031, not a percentage.</details>
# <details><summary>Hint 3</summary>Divide the result of projection_parameters(vision_dim, llm_dim) by llm_parameters.</details>

# %% exercise="projection_share" twin="vlm_course.costs.projection_share"
def projection_share(vision_dim: int, llm_dim: int, llm_parameters: int) -> float:
    """Parameters of the bridge over those of the language model."""
    ### BEGIN SOLUTION
    return (vision_dim * llm_dim + llm_dim + llm_dim * llm_dim + llm_dim) / llm_parameters
    ### END SOLUTION

# %% check="projection_share" points=2
check("projection_share", globals())

# %% covers=["2-idea-2"]
projection_share = part("projection_share", globals())
count = bridge_study.count_parameters
llm_7b, llm_13b = count(llava_7b.decoder), count(llava_13b.decoder)
print(f"7B bridge in 7B model:    {100 * projection_share(1024, 4096, llm_7b):.3f} %")
print(f"13B bridge in 13B model:  {100 * projection_share(1024, 5120, llm_13b):.3f} %")
print(f"7B bridge in 13B model:   {100 * projection_share(1024, 4096, llm_13b):.3f} %")
print(f"language models: {llm_13b:,} / {llm_7b:,} = {llm_13b / llm_7b:.2f}")

# %% [markdown]
# Two pairs are real: 0.311 % and 0.242 %, less for the larger model because it grows by 1.93 and its bridge by 1.5. The lesson's 0.16 % is the third line: the bridge of one model over the other model.

# %% [markdown] covers=["2-idea-2"]
# Does this sliver carry the whole alignment? In LLaVA's first training stage, yes: only the bridge learns. In the second stage the bridge *and the whole language model* learn; the vision tower stays frozen. Count what may change in each stage.

# %% covers=["2-idea-2"]
for name, model in (("7B", llava_7b), ("13B", llava_13b)):
    parts = {"vision tower": count(model.vision), "bridge": count(model.bridge), "language model": count(model.decoder)}
    total = sum(parts.values())
    print(f"{name}: " + ", ".join(f"{key} {100 * value / total:.2f} %" for key, value in parts.items()))
    stage_2 = parts["bridge"] + parts["language model"]
    print(f"    trained in stage 1: {100 * parts['bridge'] / total:.2f} %   in stage 2: {100 * stage_2 / total:.1f} %")

# %% [markdown]
# Stage 2 trains over 95 % of the model. The bridge is where vision enters, but the reader on the other side learns too. Chapter 6 trains both stages and measures what each adds.

# %% [markdown] covers=["2-build-1"]
# ## Build it
#
# ### Build It: the projection bridge  ·  easy  ·  about 15 minutes  ·  4 points
#
# Write `VisionProjection(vision_dim, llm_dim)`: a linear layer, an exact GELU, a linear layer, kept in one `nn.Sequential` called `mlp`. It takes `[B, N, D_vision]` and returns `[B, N, D_llm]`: every patch in, every patch out.
#
# <details><summary>Hint 1</summary>Three modules in a row: what is the width between them? Look at the shapes above.</details>
# <details><summary>Hint 2</summary>nn.Linear works on the last dimension, so [B, N, D] needs no reshaping.</details>
# <details><summary>Hint 3</summary>nn.Sequential(nn.Linear(vision_dim, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))</details>

# %% exercise="vision_projection" twin="vlm_course.bridges.VisionProjection" covers=["2-build-1"]
class VisionProjection(nn.Module):
    """Two linear maps with an exact GELU between: [B, N, D_vision] -> [B, N, D_llm]."""

    def __init__(self, vision_dim: int, llm_dim: int):
        super().__init__()
        ### BEGIN SOLUTION
        self.mlp = nn.Sequential(
            nn.Linear(vision_dim, llm_dim),
            nn.GELU(),
            nn.Linear(llm_dim, llm_dim),
        )
        ### END SOLUTION

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        ### BEGIN SOLUTION
        return self.mlp(features)  # [B, N, D_vision] -> [B, N, D_llm]
        ### END SOLUTION

# %% check="vision_projection" points=4 covers=["2-build-1"]
check("vision_projection", globals())
lesson_test = VisionProjection(1024, 4096)
assert lesson_test(torch.randn(2, 576, 1024)).shape == (2, 576, 4096)  # [B, N, D_vision] -> [B, N, D_llm]
assert sum(p.numel() for p in lesson_test.parameters()) == 20_979_712

# %%
VisionProjection = part("VisionProjection", globals())

# %% [markdown] covers=["2-build-1"]
# ### Build It: the bridge of the 13B model  ·  easy  ·  about 5 minutes  ·  2 points
#
# Write `build_projection_13b()`, which returns the bridge that LLaVA-1.5 13B needs. Use your class; only its two numbers change.
#
# <details><summary>Hint 1</summary>The vision tower is the same, CLIP ViT-L/14. What differs between Vicuna-7B and Vicuna-13B?</details>
# <details><summary>Hint 2</summary>The bridge ends where word embeddings live. Look up the width of the 13B model's embedding table.</details>
# <details><summary>Hint 3</summary>The embedding table of Vicuna-13B is 32000 x 5120, so the bridge goes from 1024 to 5120.</details>

# %% exercise="vision_projection_13b" twin="vlm_course.costs.build_projection_13b" covers=["2-build-1"]
def build_projection_13b() -> nn.Module:
    """The bridge of LLaVA-1.5 13B."""
    ### BEGIN SOLUTION
    return VisionProjection(1024, 5120)
    ### END SOLUTION

# %% check="vision_projection_13b" points=2
check("vision_projection_13b", globals())

# %% [markdown]
# ### Your class makes the model see
#
# A class is only a shape until it has weights. Fill yours with the trained numbers of the shipped bridge, put it into the model, and ask about a scene. (The line above says whether it is yours already.)

# %%
mine = VisionProjection(192, 256)
with torch.no_grad():
    for own, trained in zip(mine.parameters(), small.model.bridge.parameters(), strict=True):
        own.copy_(trained)
model = Llava(small.model.config, bridge=mine)
model.vision, model.decoder = small.model.vision, small.model.decoder
model.eval().requires_grad_(False)
print(f"a bridge of {count(mine):,} parameters in a model of {count(model):,}")

# %%
def ask(model, words, pixels):
    """Answer a question about one image [3, H, W]."""
    ids, _ = chat.encode_chat(small.tokenizer, [(words, None)], model.config.visual_tokens)
    new = generation.generate(  # [1, T] and [1, 3, H, W] -> [1, new]
        model, torch.tensor([ids]), pixels[None], max_new_tokens=32, eos_id=small.tokenizer.eos_id)
    return small.tokenizer.decode(new[0])

print("in the image:", ", ".join(exam.scenes.describe(0)))
for words in ("Describe the image.", *exam.texts[0][:4]):
    print(f"{words}  ->  {ask(model, words, exam.pixels[0])}")

# %% [markdown]
# The same model, the same request, the same class with *fresh* weights instead of trained ones:

# %%
torch.manual_seed(0)
model.bridge = VisionProjection(192, 256).requires_grad_(False)
print("Describe the image.  ->", ask(model, "Describe the image.", exam.pixels[0]))
model.bridge = mine

# %% [markdown]
# The decoder describes objects that are not there. Same class, same width, other numbers: the architecture is nothing special, the training is.

# %% [markdown] covers=["2-table-1"]
# ## Four bridges side by side
#
# A linear map and an MLP keep every patch. A Perceiver resampler and a C-Abstractor compress: many features in, few tokens out. All four at LLaVA's size, from 576 features of width 1024, counted on the meta device.

# %% covers=["2-table-1"]
table = {}
for width in (4096, 5120):
    kinds = bridge_study.four_bridges(vision_dim=1024, llm_dim=width).items()
    table[width] = {name: bridge_study.bridge_cost(name, build, tokens=576, vision_dim=1024) for name, build in kinds}
print(f"{'bridge':22s}{'for 7B':>12s}{'for 13B':>13s}{'tokens out':>12s}{'GFLOPs (7B)':>13s}")
for name, cost in table[4096].items():
    print(f"{name:22s}{cost.parameters:12,}{table[5120][name].parameters:13,}{cost.tokens:12d}{cost.gigaflops:13.1f}")

# %% [markdown] covers=["2-table-1"]
# The resampler here has Flamingo's depth, six layers, and its 64 queries, at the tower's width of 1024; the C-Abstractor has Honeybee's sizes. The linear map is smallest in every column but one: the tokens that it leaves for the language model.

# %%
figure, axis = figures.axes(width=5.6, height=2.6)
for name, cost in table[4096].items():
    axis.plot(cost.tokens, cost.parameters / 1e6, "o", color=figures.VISION)
    axis.annotate(name, (cost.tokens, cost.parameters / 1e6), xytext=(6, 4), textcoords="offset points")
axis.set(xlabel="visual tokens for one image", ylabel="parameters (millions)", xlim=(0, 720), ylim=(0, 95))
figures.show(figure, "Four bridges by tokens and parameters: resampler 64 tokens and 80 million, C-Abstractor 144 and "
                     "37 million, linear 576 and 4 million, MLP 576 and 21 million.")

# %% [markdown] covers=["2-table-1"]
# Which published models use them? Every number below has its source; "counted" means that we built the module, "quoted" that we repeat what its authors, or somebody about them, say.

# %% covers=["2-table-1"]
for row in catalog.MODELS:
    origin = "counted" if row.counted else "quoted"
    flow = f"{row.patches or 'any number'} -> {row.visual_tokens} tokens"
    print(f"{row.name:27s}{row.bridge:20s}{flow:>24s}{row.bridge_parameters / 1e6:8.1f}M {origin}")

# %% [markdown]
# Four corrections to the lesson's table: LLaVA v1 has 256 tokens, from 224-pixel images. Flamingo's resampler has 194 million parameters, not 100. Qwen-VL's bridge is one cross-attention layer with 256 queries, 0.08 billion, not a Perceiver. And 50 million is the C-Abstractor of a 13B model.

# %%
from IPython.display import Markdown

Markdown("\n".join(f"- {row.name}: {row.source} (checked {row.checked})" for row in catalog.MODELS))

# %% [markdown]
# Two of the quoted numbers can be rebuilt roughly from their descriptions: Flamingo's six layers of width 1536 with 16 heads of 128, and Qwen-VL's single layer of width 4096, with its norms, that reads features of width 1664.

# %% covers=["2-table-1"]
with torch.device("meta"):
    flamingo = bridges.PerceiverResampler(dim=1536, queries=64, depth=6, heads=16, head_dim=128)
    qwen = nn.ModuleList([nn.Linear(1664, 4096, bias=False), nn.MultiheadAttention(4096, 32), nn.Embedding(256, 4096),
                          nn.LayerNorm(4096), nn.LayerNorm(4096)])
print(f"Flamingo's resampler, rebuilt: {count(flamingo):,}   quoted: 194M")
print(f"Qwen-VL's layer, rebuilt:      {count(qwen):,}   quoted: 0.08B")

# %% [markdown]
# The first comes within 3 % of the quoted 194 million; the sizes are those that the flamingo-mini project took from the paper. The second is 75 million, which rounds to the quoted 0.08 billion. Close is not proof, but 100 million fits neither.

# %% [markdown] covers=["2-table-1"]
# ### Derivation: what a bridge calculates  ·  medium  ·  about 10 minutes  ·  2 points
#
# Write `bridge_flops(kind, tokens, vision_dim, llm_dim)` for `kind` "linear" and "mlp": the floating-point operations of the matrix products for one image. A multiply-add is two. Leave out biases and GELU. For any other kind raise a ValueError.
#
# <details><summary>Hint 1</summary>For one token, a linear map from n_in to n_out multiplies and adds once for each of its weights.</details>
# <details><summary>Hint 2</summary>A multiplication and an addition are two operations, and every token goes through the layer.</details>
# <details><summary>Hint 3</summary>Linear: 2 * tokens * vision_dim * llm_dim. The MLP does that, and 2 * tokens * llm_dim * llm_dim more.</details>

# %% exercise="bridge_flops" twin="vlm_course.costs.bridge_flops"
def bridge_flops(kind: str, tokens: int, vision_dim: int, llm_dim: int) -> int:
    """Floating-point operations of the matrix products of one image's bridge."""
    ### BEGIN SOLUTION
    if kind == "linear":
        return 2 * tokens * vision_dim * llm_dim
    if kind == "mlp":
        return 2 * tokens * (vision_dim * llm_dim + llm_dim * llm_dim)
    raise ValueError(f"kind is {kind!r}, expected 'linear' or 'mlp'")
    ### END SOLUTION

# %% check="bridge_flops" points=2
check("bridge_flops", globals())

# %%
bridge_flops = part("bridge_flops", globals())
for kind, name in (("linear", "linear"), ("mlp", "MLP")):
    print(f"{name:7s} formula {bridge_flops(kind, 576, 1024, 4096):,}   PyTorch's counter {table[4096][name].flops:,}")

# %% [markdown]
# The formula and PyTorch's counter agree to the last operation. Now the bill that matters: what the *language model* pays for the tokens that a bridge hands over. Reading one token costs it about two operations per weight.

# %%
print(f"{'bridge':22s}{'bridge, GFLOPs':>15s}{'7B model reads, GFLOPs':>24s}")
for name, cost in table[4096].items():
    reading = bridge_study.reading_flops(llava_7b.decoder, cost.tokens)
    print(f"{name:22s}{cost.gigaflops:15.1f}{reading / 1e9:24.0f}")

# %% [markdown]
# The most expensive bridge costs 0.3 % of what the model spends on reading 576 tokens. What compression saves, it does not save in the bridge: the six-layer resampler works more than the MLP. It saves eight ninths of the reading.

# %% [markdown]
# Counted work is not time. The same four kinds at the size of our small model, in milliseconds on your computer; your numbers will differ.

# %% tags=["nbval-ignore-output"]
timed = {
    "linear": bridges.LinearBridge(192, 256),
    "MLP": bridges.VisionProjection(192, 256),
    "Perceiver resampler": bridge_study.resampler_bridge(192, 256, queries=16, depth=6, heads=6, head_dim=32),
    "C-Abstractor": bridges.CAbstractor(vision_dim=192, llm_dim=256, queries=36, hidden=192, depth=3, grid=12),
}
for name, bridge in timed.items():
    print(f"{name:22s}{bridge_study.milliseconds(bridge, torch.randn(4, 144, 192)):8.2f} ms for 4 images")

# %% [markdown] covers=["2-idea-3"]
# ## A resampler, from one query to sixty-four
#
# How do 576 vectors become 64? By asking 64 questions. Each *query* is a learned vector that looks at all features and takes a weighted mean. Start with one query and three features of two numbers.

# %%
query = torch.tensor([1.0, 0.0])
three = torch.tensor([[2.0, 1.0], [0.0, 5.0], [2.0, -1.0]])  # [N, D]
scores = [sum(q * k for q, k in zip(query.tolist(), row, strict=True)) for row in three.tolist()]
weights = torch.tensor(scores).softmax(0)                    # [N]
print("scores ", scores)
print("weights", [f"{w:.3f}" for w in weights.tolist()])
print("taken  ", [f"{v:.3f}" for v in (weights @ three).tolist()])  # [N] x [N, D] -> [D]

# %% [markdown]
# The query asks for a large first number. Two features have it and share the weight; what is taken is their mean. Their second numbers, 1 and -1, cancel: a mean of two cannot tell which was which. Remember that.

# %%
attended = attend(query.view(1, 1, 1, 2), three.view(1, 1, 3, 2) * 2**0.5, three.view(1, 1, 3, 2))
print([f"{v:.3f}" for v in attended.flatten().tolist()])  # q [B, H, M, d], k and v [B, H, N, d] -> [B, H, M, d]

# %% [markdown]
# The course's `attend` does the same for whole batches. (It divides scores by the square root of *d*; the factor behind the keys undoes this.) The number of outputs is the number of queries, *M*, whatever *N* is.

# %% [markdown] covers=["2-bonus-1"]
# ### Derivation: the parameters of a Perceiver resampler  ·  medium  ·  about 15 minutes  ·  3 points
#
# A resampler learns `queries` latent vectors of width `dim`. Each of its `depth` layers has a LayerNorm for features and one for latents; bias-free maps to queries, keys, values and back, between `dim` and `heads * head_dim`; and a feed-forward net: LayerNorm, two bias-free maps, `mlp_ratio` times as wide inside. One LayerNorm ends it all.
#
# <details><summary>Hint 1</summary>Write down what is new: the latents, then for each layer the attention, its two norms and the feed-forward net.</details>
# <details><summary>Hint 2</summary>Attention has four maps without biases between dim and heads * head_dim. A LayerNorm has 2 * dim parameters.</details>
# <details><summary>Hint 3</summary>Each layer: three LayerNorms, 4 * dim * heads * head_dim, and 2 * mlp_ratio * dim * dim. One LayerNorm ends it.</details>

# %% exercise="resampler_parameters" twin="vlm_course.costs.resampler_parameters" covers=["2-bonus-1"]
def resampler_parameters(dim: int, queries: int, depth: int, heads: int, head_dim: int, mlp_ratio: int) -> int:
    """Parameters of the resampler described above."""
    ### BEGIN SOLUTION
    norm = 2 * dim
    attention = 2 * norm + 4 * dim * heads * head_dim
    feed_forward = norm + 2 * dim * mlp_ratio * dim
    return queries * dim + depth * (attention + feed_forward) + norm
    ### END SOLUTION

# %% check="resampler_parameters" points=3
check("resampler_parameters", globals())

# %%
resampler_parameters = part("resampler_parameters", globals())
latents, whole = 64 * 1024, resampler_parameters(1024, 64, 6, 16, 64, 4)
print(f"resampler of the table: {whole:,}   of these latents: {latents:,}")
print(f"with the linear map to 4096 behind it: {whole + 1024 * 4096 + 4096:,}")

# %% [markdown]
# That is the table's number. The queries themselves are under 0.1 % of it; layers that read and think are the rest. And 576 appears nowhere in the formula.

# %% [markdown] covers=["2-bonus-1"]
# ### Bonus Build It: a Perceiver resampler  ·  hard  ·  about 45 minutes  ·  5 points
#
# Write `PerceiverResampler` and the `PerceiverLayer` that it stacks. Keys and values come from the normed features *and* the normed latents. Both the attention and the feed-forward net are added to the latents. Keep the names and shapes listed in the stub.
#
# <details><summary>Hint 1</summary>The latents are an nn.Parameter of shape [queries, dim]: one copy for each image of the batch, by expand.</details>
# <details><summary>Hint 2</summary>Queries come from the normed latents; keys and values from the normed media followed by the normed latents.</details>
# <details><summary>Hint 3</summary>latents = latents + to_out(attention), then latents = latents + feed_forward(latents); a LayerNorm at the end.</details>

# %% exercise="perceiver_resampler" twin=["vlm_course.bridges.PerceiverLayer", "vlm_course.bridges.PerceiverResampler"] covers=["2-bonus-1"]
class PerceiverLayer(nn.Module):
    """The latents read the media and themselves. forward: media [B, N, D], latents [B, M, D] -> latents [B, M, D].

    norm_media, norm_latents: LayerNorm(dim). to_q, to_k, to_v: dim -> heads * head_dim, to_out: back, all without bias.
    feed_forward: Sequential of LayerNorm(dim), Linear(dim, mlp_ratio * dim), activation(), Linear back, without biases.
    """

    def __init__(self, *, dim: int, heads: int, head_dim: int, mlp_ratio: int, activation: type[nn.Module]):
        super().__init__()
        ### BEGIN SOLUTION
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, mlp_ratio * dim, bias=False),
            activation(),
            nn.Linear(mlp_ratio * dim, dim, bias=False),
        )
        ### END SOLUTION

    def forward(self, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        ### BEGIN SOLUTION
        queries = self.norm_latents(latents)  # [B, M, D]
        context = torch.cat([self.norm_media(media), queries], dim=1)  # [B, N, D], [B, M, D] -> [B, N+M, D]
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, H*d] -> [B, H, T, d]
            for x in (self.to_q(queries), self.to_k(context), self.to_v(context))
        )
        read = attend(q, k, v)  # [B, H, M, d] x [B, H, N+M, d] -> [B, H, M, d]
        latents = latents + self.to_out(read.transpose(1, 2).flatten(2))  # [B, H, M, d] -> [B, M, D]
        return latents + self.feed_forward(latents)  # [B, M, D]
        ### END SOLUTION


class PerceiverResampler(nn.Module):
    """Any number of features in, `queries` tokens out. forward: features [B, N, D] -> [B, queries, D].

    latents: Parameter [queries, dim]. layers: ModuleList of `depth` PerceiverLayers. norm: LayerNorm(dim), at the end.
    """

    def __init__(
        self,
        *,
        dim: int,
        queries: int,
        depth: int = 1,
        heads: int = 8,
        head_dim: int = 64,
        mlp_ratio: int = 4,
        activation: type[nn.Module] = nn.GELU,
    ):
        super().__init__()
        ### BEGIN SOLUTION
        self.latents = nn.Parameter(torch.randn(queries, dim))
        self.layers = nn.ModuleList(
            PerceiverLayer(dim=dim, heads=heads, head_dim=head_dim, mlp_ratio=mlp_ratio, activation=activation)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        ### END SOLUTION

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        ### BEGIN SOLUTION
        latents = self.latents.expand(len(features), -1, -1)  # [M, D] -> [B, M, D]
        for layer in self.layers:
            latents = layer(features, latents)  # [B, N, D], [B, M, D] -> [B, M, D]
        return self.norm(latents)  # [B, M, D]
        ### END SOLUTION

# %% check="perceiver_resampler" points=5 covers=["2-bonus-1"]
check("perceiver_resampler", globals())

# %% covers=["2-bonus-1", "2-idea-3"]
PerceiverResampler = part("PerceiverResampler", globals())
torch.manual_seed(0)
resampler = PerceiverResampler(dim=192, queries=64, depth=2, heads=6, head_dim=32).requires_grad_(False)
for n in (576, 144, 1000):
    print(f"{n:4d} features in, {resampler(torch.randn(1, n, 192)).shape[1]} tokens out")  # [1, N, D] -> [1, 64, D]

# %% [markdown]
# Any number in, 64 out. That is Flamingo's reason for it: its features come from a convolutional network and from video, in no fixed number. Now a property that surprises. Shuffle the features:

# %%
torch.manual_seed(1)
cloud = torch.randn(1, 576, 192)             # [1, N, D]
shuffled = cloud[:, torch.randperm(576)]     # the same features in another order
print("the 64 tokens are the same:", torch.allclose(resampler(cloud), resampler(shuffled), atol=1e-5))

# %% [markdown]
# A resampler cannot know where a feature stood. An MLP keeps places by keeping the order. A resampler keeps only what a feature *says* about its place; CLIP's features do, because position embeddings were added before its first block.

# %% [markdown] covers=["2-idea-3"]
# ## What compression loses
#
# A mean of two features cannot tell which was which. So average neighbours: give each token the mean of its 2 x 2, 3 x 3 or 6 x 6 block. The decoder still reads 144 positions; only 36, 16 or 4 of the tokens differ.

# %% covers=["2-idea-3"]
print(f"{'different tokens':>16s}" + "".join(f"{kind:>11s}" for kind in exam.kinds[:-1]) + f"{'box error':>12s}")
for block in (1, 2, 3, 6):
    result = score(small.model, exam, bridge_study.block_average(tokens, block))
    row = "".join(f"{result.accuracy(kind):11.2f}" for kind in exam.kinds[:-1])
    print(f"{(12 // block) ** 2:16d}{row}{result.box_error():9.1f} px")
other = score(small.model, exam, tokens.roll(1, dims=0))
row = "".join(f"{other.accuracy(kind):11.2f}" for kind in exam.kinds[:-1])
print(f"{'another scene':>16s}{row}{other.box_error():9.1f} px")
print(f"{'most frequent':>16s}" + "".join(f"{exam.majority(kind):11.2f}" for kind in exam.kinds[:-1]))

# %% [markdown]
# The first averaging already costs every kind something. Boxes miss by most of a patch of 8 pixels, where they were exact before. With four tokens colour and shape are named less often than by always giving the most frequent answer. (At most sixteen answers a kind: one is a step of 0.06.)

# %% [markdown] covers=["2-idea-3"]
# This shows what averaging does to a decoder that never met averaged tokens. Trained with them, it might do better; we have not tried. Nor is it a law that compression cannot locate: Qwen-VL draws boxes from 256 tokens. But detail has to fit somewhere, and fewer tokens are less room.

# %% [markdown] covers=["2-simulation-1"]
# ## Alignment, by degrees
#
# The trained bridge ends in a matrix *W* and a bias. Turn both by a rotation *R* and you have another bridge: same class, same size, same lengths, same distances among tokens. Every token has turned by the same angle; turn it back, and all is as before.

# %%
from vlm_course.simulations.projection_alignment import AlignmentExperiment, alignment_simulation

experiment = AlignmentExperiment(small.model, exam)
for degrees in (0, 15, 30, 45, 60, 90, 180):
    now = experiment.measure(degrees)
    accuracy, loss = now.score.accuracy(), now.score.loss
    says = now.score.answer(0, "colour")
    print(f"{degrees:4d} degrees   cosine {now.cosine:5.2f}   exact {accuracy:.2f}   loss {loss:5.2f}   says: {says}")
print(f"another scene                 exact {experiment.other_image.accuracy():.2f}")

# %%
before, after = tokens, experiment.turned(90)
print("lengths equal:  ", torch.allclose(before.norm(dim=-1), after.norm(dim=-1), atol=1e-3))
print("distances equal:", torch.allclose(torch.pdist(before[0]), torch.pdist(after[0]), atol=1e-3))
right, turned = experiment.measure(0).score.accuracy(), experiment.measure(90).score.accuracy()
other = experiment.other_image.accuracy()
reveal("p_2_2", "c", because=f"Exact answers fall from {right:.2f} to {turned:.2f}; "
                             f"about another scene they are {other:.2f}.")

# %% [markdown]
# Alignment breaks by degrees. At 15 the decoder hardly notices; at 45 about four answers in ten are wrong; at 90 it does no better than with another scene, and may answer a question about colour with a number. The image is still in the tokens. The reader has lost it.

# %%
main = (tokens @ experiment.basis[:, :2]).square().sum() / tokens.square().sum()  # [B, N, D] x [D, 2]
units = nn.functional.normalize(tokens.flatten(0, 1), dim=-1)                   # [B, N, D] -> [B*N, D]
print(f"share of the squared length in the main plane: {main:.2f}")
print(f"cosine of two tokens, whichever two, on average: {units.mean(0).square().sum():.2f}")
for planes in (1, 128):
    now = experiment.measure(90, planes)
    print(f"90 degrees in {planes:3d} planes: cosine {now.cosine:.2f}, exact answers {now.score.accuracy():.2f}")

# %% [markdown]
# Turning 2 of 256 directions does half of the damage of turning all: most of the squared length lies in that one plane. There the tokens crowd together, so a high cosine says little: at 45 degrees a token is hardly closer to its trained self than any two tokens are to each other.

# %% [markdown] covers=["2-simulation-1"]
# Turn it yourself. The picture stands still; the one below it obeys the controls. Left, tokens of patches inside objects, in their main plane, each in the colour of its object; hollow dots are where training put them. Right, the exam.

# %% covers=["2-simulation-1"]
simulation = alignment_simulation(experiment, degrees=45)
simulation.first_frame()

# %% tags=["nbval-ignore-output"] covers=["2-simulation-1"]
simulation

# %% [markdown] covers=["2-idea-4"]
# ## Where do visual tokens land?
#
# The lesson says that the projection brings a furry patch to the region of the word *cat*. Nothing in the training asks for that: tokens only have to be useful input. So measure. For each token inside an object: which word embedding is nearest by cosine?

# %% covers=["2-idea-4"]
vocabulary = small.tokenizer.words
rows = torch.tensor([small.tokenizer.id_of(word) for word in vocabulary])
embeddings = small.model.decoder.token_embedding.weight[rows]                   # [V, D_llm]
objects = experiment.patch_objects()                                            # [B, N], -1 outside objects
inside = tokens[objects >= 0]                                                   # [n, D_llm]
to_words = bridge_study.cosine_table(inside, embeddings)                        # [n, V]
between = bridge_study.cosine_table(embeddings, embeddings).fill_diagonal_(-1)  # [V, V]
print(f"{len(inside)} tokens, {len(vocabulary)} words")
print(f"cosine with the nearest word: tokens {to_words.amax(1).mean():.2f}, words {between.amax(1).mean():.2f}")
print(f"mean length: tokens {inside.norm(dim=1).mean():.2f}, words {embeddings.norm(dim=1).mean():.2f}")

# %% [markdown]
# And is the nearest word the right one? Count how often it is the colour or the shape of the object. The control pairs each token's nearest word with the objects of all tokens.

# %% covers=["2-idea-4"]
from vlm_course.worlds.scenes import COLOURS, SHAPES

nearest = [vocabulary[i] for i in to_words.argmax(1).tolist()]
slot = objects.clamp(min=0)
colour, shape = (kind.gather(1, slot)[objects >= 0].tolist() for kind in (exam.scenes.colour, exam.scenes.shape))
names = [{COLOURS[c], SHAPES[s]} for c, s in zip(colour, shape, strict=True)]
hits = sum(word in own for word, own in zip(nearest, names, strict=True)) / len(names)
chance = sum(word in other for word in nearest for other in names) / len(names) ** 2
often = sorted(set(nearest), key=lambda word: (-nearest.count(word), word))[:5]
print(f"nearest word names the colour or the shape: {hits:.2f}   by chance: {chance:.2f}")
print("most frequent:", ", ".join(f"{word} {nearest.count(word) / len(nearest):.2f}" for word in often))

# %% [markdown]
# Our model gives the lesson half a point. Nothing in the loss asked for it, yet about nine in ten of these tokens are nearest to a word for their own object; by chance it would be one in eight. But near is not close: the cosine is about 0.2, and a token is some 30 times as long as a word.

# %%
reveal("p_2_3", "a", because=f"For {hits:.0%} of the tokens inside objects it is the colour or the shape; "
                             f"by chance {chance:.0%}.")

# %% [markdown]
# So a token does not *become* a word. It leans towards one, from far away. And this is one small model, with 93 words and a world of coloured shapes: about CLIP and Vicuna, with 32,000 word pieces and real photographs, it proves nothing.

# %% [markdown] covers=["2-check-1"]
# ## Check question
#
# One question to end on. Choose on the buttons to read the reason for each option, then return your letter below: that is the answer that counts.

# %% covers=["2-check-1"]
question("q_2_1")

# %% exercise="q_2_1"
def q_2_1() -> str:
    """Return the letter of your answer."""
    ### BEGIN SOLUTION
    return "c"
    ### END SOLUTION

# %% check="q_2_1" points=1 covers=["2-check-1"]
check("q_2_1", globals())

# %% [markdown]
# ## Claims of the chapter
#
# What the source lesson says, in our words, what is true, and the section of this chapter that shows it. The last column says how strong the evidence is.

# %%
from vlm_course.claims import claim_table

claim_table(2)

# %% [markdown]
# ## What you built, and where it lives
#
# - `VisionProjection`: `vlm_course/bridges.py`. The `mlp2x_gelu` projector of LLaVA-1.5; in transformers `LlavaMultiModalProjector`.
# - `PerceiverResampler`: the same file. Flamingo's; in transformers `IdeficsPerceiverResampler` (ReLU for GELU) is its closest relative.
# - the counts: `vlm_course/costs.py`; the measurements: `vlm_course/bridge_study.py` and `vlm_course/probe_questions.py`.

# %% [markdown]
# The bridge hands over tokens of the right width and meaning. Where do they go in the sequence, and who may look at whom? Chapter 3 joins them with the words.
