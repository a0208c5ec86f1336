# %% [markdown]
# # Chapter 10: Fine-tuning LLaVA
#
# You wrote the model. In this chapter you change what it knows, with the methods that are used on real ones. The next cell looks at your machine and says which of three paths this chapter takes on it.

# %% [markdown]
# **By the end you can**
#
# - write LoRA, merge it, and say what it saves and what it does not;
# - bring conversations about your own images into the published format, and find what is broken in them;
# - run a fine-tuning that survives being killed, and report what it changed, beside its controls;
# - save a checkpoint that others load, and state what a run cost.

# %% tags=["nbval-ignore-output"]
from vlm_course.finetune import choose

machine = choose.look()        # path 1: choose.look("the folder of a LLaVA-1.5 checkpoint"), or choose.look(hub=True)
choice = choose.decide(machine)
print(choose.said(machine, choice))

# %% [markdown]
# Every path is the same code. Path 1 tunes LLaVA-1.5 on a GPU, path 2 teaches a language model of 135 million parameters to see, path 3 takes two steps with the small model. Nothing is downloaded unless you ask for it by name.

# %%
from vlm_course.build.costs import measured

print("Reading and doing: about 80 minutes.")
print(measured("10_finetune_llava"))

# %% locked="imports"
import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course import budget
from vlm_course.finetune.lora import StandsForLinear, add_lora
from vlm_course.grading import check, part, question
from vlm_course.llava import LLAVA_7B, LLAVA_13B
from vlm_course.progress import predict, reveal
from vlm_course.simulations import figures

# %% [markdown]
# ## Predict first
#
# Four questions before anything runs. Choose an answer and say how sure you are; each is settled where it is computed.

# %%
predict("p_10_1", "LoRA of rank 128 beside every linear map of LLaVA-1.5 7B's decoder: how many parameters learn, "
        "as a share of those maps' own?",
        {"a": "about 0.05 %", "b": "about 0.5 %", "c": "about 5 %", "d": "about 50 %"})

# %%
predict("p_10_2", "A starts at random values, B at zero. Which of them has moved after the first step of plain gradient "
        "descent?",
        {"a": "both", "b": "A alone", "c": "B alone", "d": "neither: B A is zero, so nothing can learn"})

# %%
predict("p_10_3", "With that LoRA only a twentieth as many parameters learn as in full tuning. How much arithmetic does a "
        "training step save?",
        {"a": "nearly all of it", "b": "about a third", "c": "none"})

# %%
predict("p_10_4", "The small model answers every question of an exam right: how many, is there, where. Then LoRA teaches it one "
        "new thing, in 40 steps that ask nothing else. How many of the old answers are still right?",
        {"a": "nearly all: its weights are frozen", "b": "about half", "c": "hardly any"})

# %% [markdown]
# ## LoRA by hand
#
# Full tuning changes every weight. Hu et al. (2021) asked how much room a change needs, and gave it little: beside a frozen matrix $W$ stand two thin ones, and only these learn: $h = Wx + \frac{\alpha}{r} B A x$. First with numbers that fit on the page.

# %%
torch.manual_seed(0)
W = torch.randint(-3, 4, (4, 6)).float()                 # [out, in], frozen
A, B = torch.ones(1, 6), torch.tensor([[1.0], [0.0], [2.0], [0.0]])     # rank 1: [1, in] and [out, 1]
print("W has", W.numel(), "numbers, A and B together", A.numel() + B.numel())
print((B @ A).int())                                     # [out, 1] x [1, in] -> [out, in]

# %% [markdown]
# The product is as large as $W$, but each of its rows is a multiple of the same one: a matrix of rank 1. With $r$ rows in $A$ and $r$ columns in $B$ the change has at most rank $r$. Whatever the rank, it can be computed in two ways:

# %%
x = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.0, 1.0])        # [in]
beside = W @ x + B @ (A @ x)                             # [in] -> [1] -> [out], beside the frozen layer
merged = (W + B @ A) @ x                                 # one matrix
print("beside:", beside.tolist())
print("merged:", merged.tolist())

# %% [markdown]
# While training, the first way is better: $W$ needs no gradient, and $B A$ is never formed. For use, the second: it costs nothing more than $W$ alone.
#
# The factor $\frac{\alpha}{r}$ keeps the size of a step about the same when you change the rank. And at the start $B$ is zero, so training begins at exactly the model that you have.

# %% [markdown]
# ### Build It: a linear layer with LoRA  ·  medium  ·  about 25 minutes  ·  5 points
#
# Write `LoRALinear(base, rank=..., alpha=..., dropout=...)`. It freezes `base` and has two parameters, `lora_a` `[rank, in]` and `lora_b` `[out, rank]`. Draw A as `nn.Linear` draws its weight, `nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))`; B is zero. Dropout acts on what A reads and nothing else. Keep `alpha / rank` as `self.scale`.
#
# `StandsForLinear` gives your layer the sizes, the weight and the bias of `self.base`, so that the model does not notice the exchange.
#
# <details><summary>Hint 1</summary>base.requires_grad_(False) freezes weight and bias and returns the layer. A and B are nn.Parameter.</details>
# <details><summary>Hint 2</summary>F.linear(x, matrix) computes x @ matrix.T: first with A, then with B. The base reads x itself, without dropout.</details>
# <details><summary>Hint 3</summary>self.base(x) + self.scale * F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b). The answer below also casts A and B to x's dtype: they may be kept in float32 beside a model in 16 bits.</details>

# %% exercise="lora_linear" twin="vlm_course.finetune.lora.LoRALinear"
class LoRALinear(StandsForLinear):
    """base(x) + (alpha / rank) * B A dropout(x), where only A and B learn. forward: [..., in] -> [..., out]."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        ### BEGIN SOLUTION
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        inner = F.linear(self.dropout(x), self.lora_a.to(x.dtype))  # [..., in] -> [..., rank]
        update = F.linear(inner, self.lora_b.to(x.dtype))  # [..., rank] -> [..., out]
        return self.base(x) + self.scale * update  # [..., out]
        ### END SOLUTION

# %% check="lora_linear" points=5
check("lora_linear", globals())

# %% [markdown]
# ### In the model
#
# `add_lora` puts a layer in the place of every linear map of the decoder's blocks and freezes the rest. Here with your class, in the model that answered in chapter 0.

# %%
from vlm_course.pretrained import load_small
from vlm_course.probe_questions import question_set

LoRALinear = part("LoRALinear", globals())
small = load_small()
exam = question_set(small.tokenizer, scenes=4)
model = copy.deepcopy(small.model)
before = model(exam.ids, exam.pixels)                    # [4, T] -> [4, T, V]
names = add_lora(model, rank=8, alpha=16, layer=LoRALinear)
learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"{len(names) // 2} layers, {learning:,} of {sum(p.numel() for p in model.parameters()):,} numbers learn")
print("the same logits as before:", torch.equal(model(exam.ids, exam.pixels), before))

# %% [markdown]
# One step of plain gradient descent on the model's own answers, and a look at what moved:

# %%
from vlm_course.loss import response_loss

parameters = dict(model.named_parameters())
first = {name: parameters[name].detach().clone() for name in names}
response_loss(model(exam.ids, exam.pixels), exam.labels).backward()
torch.optim.SGD([parameters[name] for name in names], lr=0.1).step()
for kind in ("lora_a", "lora_b"):
    moved = sum(not torch.equal(parameters[name], first[name]) for name in names if name.endswith(kind))
    print(f"{kind}: {moved} of {len(names) // 2} moved")

# %%
reveal("p_10_2", "c", because="The gradient of A passes through B, which is zero; that of B passes through A, which is not.")

# %% [markdown]
# From the second step on both move. If both had started at zero, neither ever would.
#
# ### Build It: merge the weights  ·  easy  ·  about 10 minutes  ·  3 points
#
# Write `merged_linear(layer)`: one `nn.Linear` with the weight $W + \frac{\alpha}{r} B A$ and the base's bias. The given layer stays as it is, so that a second call gives the same.
#
# <details><summary>Hint 1</summary>B A is [out, rank] times [rank, in]: as large as the weight, so the two can be added.</details>
# <details><summary>Hint 2</summary>copy.deepcopy(layer.base) is a layer that you may change. @torch.no_grad() lets you change its weight in place.</details>
# <details><summary>Hint 3</summary>merged.weight += layer.scale * (layer.lora_b @ layer.lora_a)</details>

# %% exercise="merged_linear" twin="vlm_course.finetune.lora.merged_linear"
@torch.no_grad()
def merged_linear(layer: LoRALinear) -> nn.Linear:
    """The layer as one nn.Linear; `layer` itself stays as it is."""
    ### BEGIN SOLUTION
    merged = copy.deepcopy(layer.base)
    merged.weight += layer.scale * (layer.lora_b @ layer.lora_a)  # [out, rank] x [rank, in] -> [out, in]
    return merged
    ### END SOLUTION

# %% check="merged_linear" points=3
check("merged_linear", globals())

# %% [markdown]
# The whole model with every layer merged gives the same logits, and is a plain one again. For the test A and B are redrawn wide, so that they change something worth seeing.

# %%
merged_linear = part("merged_linear", globals())
with torch.no_grad():
    for name in names:
        parameters[name].normal_(std=0.05)
    unmerged = model(exam.ids, exam.pixels)
    for name in sorted({name.rpartition(".")[0] for name in names}):
        block, _, kind = name.rpartition(".")
        setattr(model.get_submodule(block), kind, merged_linear(model.get_submodule(name)))
    merged = model(exam.ids, exam.pixels)
print(f"LoRA changes logits by up to {(unmerged - before).abs().max():.0f}")
print("merged and unmerged agree to 0.001:", bool((merged - unmerged).abs().max() < 1e-3))
print("parameters named as in a plain model:", set(model.state_dict()) == set(small.model.state_dict()))

# %% [markdown]
# ## What LoRA saves, and what it does not
#
# ### Derivation: what LoRA saves  ·  easy  ·  about 15 minutes  ·  3 points
#
# A block of a decoder has seven linear maps without biases: query and out (`width` to `width`), key and value (`width` to `kv_width`), gate and up (`width` to `mlp_width`), down (back). LoRA of one rank stands beside each. For every parameter that learns, AdamW keeps two float32 numbers. Write `lora_budget`: the parameters of LoRA, those of full tuning of the same maps, and the bytes that AdamW keeps for each of the two.
#
# <details><summary>Hint 1</summary>Beside a map from i to o numbers, A has rank * i numbers and B has o * rank. The map has i * o.</details>
# <details><summary>Hint 2</summary>Add up the seven maps of a block, then multiply by layers.</details>
# <details><summary>Hint 3</summary>Two float32 numbers are 8 bytes: return lora, full, 8 * lora, 8 * full.</details>

# %% exercise="lora_budget" twin="vlm_course.finetune.lora.lora_budget"
def lora_budget(width: int, kv_width: int, mlp_width: int, layers: int, rank: int) -> tuple[int, int, int, int]:
    """Parameters of LoRA, of full tuning, bytes of AdamW's moments with LoRA, with full tuning."""
    ### BEGIN SOLUTION
    both_ways = [(width, width), (width, kv_width)] * 2  # query and out, key and value
    maps = both_ways + [(width, mlp_width)] * 3  # gate, up, down: the sum of the sides is the same either way
    lora = layers * sum(rank * (one + other) for one, other in maps)
    full = layers * sum(one * other for one, other in maps)
    return lora, full, 8 * lora, 8 * full
    ### END SOLUTION

# %% check="lora_budget" points=3
check("lora_budget", globals())

# %%
lora_budget = part("lora_budget", globals())
for name, config in (("7B", LLAVA_7B.text), ("13B", LLAVA_13B.text)):
    for rank in (8, 128):
        lora, full, few, many = lora_budget(config.width, config.kv_heads * config.head_dim, config.mlp_width, config.layers, rank)
        print(f"{name:4s} rank {rank:3d}: {lora / 1e6:5.1f} M parameters, {100 * lora / full:4.2f} % of {full / 1e9:.2f} G;  "
              f"AdamW keeps {few / 1e9:5.2f} GB against {many / 1e9:.1f} GB")

# %%
lora, full, few, many = lora_budget(4096, 4096, 11008, 32, 128)
reveal("p_10_1", "c", because=f"{lora:,} parameters beside {full:,}: {100 * lora / full:.1f} %.")

# %% [markdown]
# Memory is where LoRA saves. With 16-bit weights and gradients and AdamW in float32, a parameter that learns takes 12 bytes, a frozen one 2. LoRA's own are few, so they can be kept in float32 altogether, 16 bytes. Activations come on top, about the same for both.

# %%
weights = 2 * budget.decoder_parameters(LLAVA_7B.text) / 1e9          # GB, 16 bits
bars = {"full": (weights, 2 * full / 1e9, many / 1e9), "LoRA 128": (weights + 4 * lora / 1e9, 4 * lora / 1e9, few / 1e9)}
figure, axis = figures.axes(width=5.8, height=1.9)
for place, parts in enumerate(bars.values()):
    left = 0
    for value, colour, label in zip(parts, (figures.VISION, figures.TEXT_LIGHT, figures.TEXT), ("weights", "gradients", "AdamW"), strict=True):
        axis.barh(place, value, left=left, color=colour, label=label if place == 0 else None)
        left += value
axis.set(yticks=[0, 1], yticklabels=list(bars), xlabel="GB for the language model of 7B")
axis.axvline(80, color=figures.GREY, linestyle="--", linewidth=1)
axis.legend(loc="upper right", ncols=3, bbox_to_anchor=(0.95, 1))
totals = {name: sum(parts) for name, parts in bars.items()}
figures.show(figure, f"Memory of the language model of LLaVA-1.5 7B while it learns, without activations: full tuning "
                     f"{totals['full']:.0f} GB, LoRA of rank 128 {totals['LoRA 128']:.0f} GB; the dashed line is a GPU of 80 GB.")

# %% [markdown]
# The dashed line is one GPU of 80 GB. Full tuning of 7B stands at its edge before the first activation; it takes moments in 16 bits, or a step inside the backward pass, so that the gradients never exist all at once. Arithmetic is another matter. Count multiply-adds for one token and one weight.

# %%
forward, to_inputs, to_weights = 2, 2, 2            # operations a weight: the pass, its gradient to x, its gradient to W
full_step = forward + to_inputs + to_weights
share = lora / full
lora_step = forward + to_inputs + share * full_step
print(f"full tuning {full_step} operations a weight and token, LoRA {lora_step:.2f}: {100 * (1 - lora_step / full_step):.0f} % less")
reveal("p_10_3", "b", because="The gradient still passes through every frozen matrix on its way down; only W's own is not computed.")

# %% [markdown]
# So LoRA makes a model fit, and a step at best one and a half times as fast. Whoever reports more has changed something else too.

# %% [markdown]
# ## Conversations as data
#
# LLaVA-Instruct and everything made after its model is a list of records: an id, the name of an image, and turns of a human and of "gpt". `<image>` stands once, in the first question. Your own data is this: a folder of images and one such file. Here the exam's scenes become one.

# %%
import json
import tempfile

from vlm_course.images import Image

folder, records = Path(tempfile.mkdtemp()), []
for row, pixels in enumerate(exam.pixels):
    Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(folder / f"scene{row}.png")
    turns = []
    for k, words in enumerate(exam.texts[row]):
        if exam.asked[row, k]:
            answer = small.tokenizer.decode(exam.labels[row][exam.turn[row] == k])
            turns += [{"from": "human", "value": words if turns else "<image>\n" + words}, {"from": "gpt", "value": answer}]
    records.append({"id": f"scene{row}", "image": f"scene{row}.png", "conversations": turns})
print(json.dumps(records[0] | {"conversations": records[0]["conversations"][:4]}, indent=1))

# %% [markdown]
# ### What is wrong with this file?
#
# Real files are broken in places: cut off, an image that nobody copied, a question without its picture. A training that meets such a line after six hours has cost six hours. `read_records` reads everything first. Here is a file with seven lines; five cannot be used.

# %%
def line(image, *texts):
    turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
    return json.dumps({"image": image, "conversations": turns})

lines = [line("scene0.png", "<image>\nhow many objects are there?", "4"),
         line("scene1.png", "<image>\nis there a star?", "no")[:-9],
         line("lost.png", "<image>\nis there a star?", "no"),
         line("scene1.png", "is there a star?", "no"),
         line("scene2.png", "<image>", "red"),
         line("scene3.png", "<image>\nis there a star?"),
         line("scene3.png", "<image>\nhow many objects are there?", "2")]
print((folder / "broken.jsonl").write_text("\n".join(lines)), "characters")

# %% [markdown]
# Read it, take out the line that the error names, read again:

# %%
from vlm_course.finetune.data import read_records
from vlm_course.finetune.reading import RecordError

usable = list(lines)
while True:
    try:
        read = read_records(folder / "broken.jsonl")
        break
    except RecordError as error:
        print(str(error).replace(str(folder), "the folder"))
        usable[error.place.line - 1] = ""                  # an empty line keeps the numbers of the others
        (folder / "broken.jsonl").write_text("\n".join(usable))
print(read)

# %% [markdown]
# Each error names the file, the line and what to do. Where a few lost records do not matter, `skip_bad=True` (in a terminal `--skip-bad`) leaves them out and counts them by reason, so that nothing is lost in silence.

# %%
(folder / "broken.jsonl").write_text("\n".join(lines))
read = read_records(folder / "broken.jsonl", skip_bad=True)
print(len(read), "usable; skipped:", read.skipped)

# %% [markdown]
# ### What the model reads
#
# The collator puts a record into the template that the model was tuned with (chapter 4), expands `<image>`, and marks what is learned: the answers and what ends them. Everything else has the label -100.

# %%
from vlm_course.finetune.collate import Collator
from vlm_course.finetune.loader import Loader
from vlm_course.finetune.tokenizers import for_small

(folder / "train.json").write_text(json.dumps(records))
words, data = for_small(), read_records(folder / "train.json")
collator = Collator(words, small.model.config)
batch = collator(data[:2])
ids, learned = batch.ids[0], batch.labels[0] >= 0
print(f"ids {list(batch.ids.shape)}, pixels {list(batch.pixels.shape)}, {int((batch.labels >= 0).sum())} labels to learn")
text = small.tokenizer.decode(ids[144:176], skip_special=False)
print("behind the image:", text)
print("to be learned:   ", small.tokenizer.decode(ids[learned][:8], skip_special=False))

# %% [markdown]
# ## Killed, and going on
#
# Long runs are interrupted: by a queue, by a price, by a cable. The engine writes what learns, the optimizer, the step and the random state, always to a file beside, which then takes the old one's place in one move. A batch follows from its step's number alone. So an interrupted run should repeat exactly what it would have done.

# %%
from vlm_course.finetune.checkpoint import read_log
from vlm_course.finetune.engine import Trainer
from vlm_course.finetune.plan import FinetunePlan

plan = FinetunePlan(mode="lora", steps=4, batch=2, lora_rank=8, lr=1e-3, save_every=0, workers=0)
loader = Loader(data, collator, plan.batch)

def pulled_plug(step):
    """The same data, until the machine goes down in the middle of a step."""
    if step == 2:
        raise KeyboardInterrupt("the plug is pulled")
    return loader(step)

pulled_plug.fingerprint = loader.fingerprint
quiet = {"log": lambda text: None, "device": "cpu"}
Trainer(copy.deepcopy(small.model), plan, loader, folder / "whole", **quiet).run()
try:
    Trainer(copy.deepcopy(small.model), plan, pulled_plug, folder / "cut", **quiet).run()
except KeyboardInterrupt as error:
    print(f"{error} after step {read_log(folder / 'cut')[-1]['step']}")
after = Trainer(copy.deepcopy(small.model), plan, loader, folder / "cut", **quiet).run()    # the same call goes on

# %%
losses = {name: [entry["loss"] for entry in read_log(folder / name)] for name in ("whole", "cut")}
for step, (one, other) in enumerate(zip(*losses.values(), strict=True), 1):
    print(f"step {step}: in one go {one:.3f}, interrupted {other:.3f}, equal to the last bit: {one == other}")

# %% [markdown]
# The step after the interruption reads the same records, adds the same dropout and takes the same rate. The engine's tests do worse to it: `kill -9` at random moments, and death at any touch of the disk.

# %% [markdown]
# ## A fine-tuning from start to end
#
# In chapter 5 you saw what our model cannot do: asked for the colour of a thing that is not there, it names some colour. In its training such a question always had an object to be about. Can a fine-tuning teach it to say so, without losing what it knows? (Path 1 asks the same of LLaVA-1.5; on path 2 a language model learns to see at all.)

# %%
from vlm_course.finetune import absent, lesson
from vlm_course.finetune.exams import grade

job = lesson.job(choice, folder, steps=2)                # the exam has fresh scenes
before, said = grade(job.model, job.adapter, job.exam, controls=False)
print(f"{job.name}: {job.work}")
for asked, true, answer in list(zip(job.exam.question, job.exam.answer, said, strict=True))[:6]:
    print(f"{asked:30s} true: {true:24s} it says: {answer}")

# %% [markdown]
# Half of the questions are about shapes that are there: a model that always denies gets these wrong. One that sees nothing can learn one of the two habits, not both. So *blind* (a black image), *swapped* (another scene's) and *majority* stand beside each result.
#
# What it learns from is a folder of images with a JSON, as above. The first conversation:

# %%
plan, batches = job.stages[-1]
batch = batches(0)
row = batch.ids[0]
print(f"ids {list(batch.ids.shape)}, pixels {list(batch.pixels.shape)}, {batch.answer_tokens} tokens to learn")
print(job.adapter.decode(row[row != job.model.config.image_id].tolist()))

# %% [markdown]
# Two steps, since this cell also runs where nobody waits. With `steps=40, scenes=2000, asked=60` above it takes a minute or two; that is the stored run below. LoRA in the language model learns, and the bridge; the tower is frozen.

# %%
reports = job.train(folder / "run", log=lambda text: None)
losses = job.losses(folder / "run")
for step, loss in losses if len(losses) < 10 else losses[:: len(losses) // 10]:
    print(f"step {step}: loss {loss:.1f}")

# %%
def side_by_side(before, after):
    print(f"{'exact answers':22s}{'before':>9s}{'after':>9s}{'blind':>9s}{'swapped':>9s}{'majority':>10s}")
    for kind, row in after.items():
        controls = "".join(f"{row[name]:9.2f}" if name in row else f"{'':9s}" for name in ("blind", "swapped", "majority"))
        print(f"{kind:22s}{before[kind]['model']:9.2f}{row['model']:9.2f}{controls}")

after, says = grade(job.model, job.adapter, job.exam)
side_by_side(before, after)

# %% [markdown]
# On path 3 two steps teach nothing that a dozen questions could show; they show that all parts fit together. What 40 steps teach was run on a CPU too, and kept by the package's own code. Below the new questions stand three kinds that it could answer before.

# %%
from vlm_course.finetune import stored

alone = stored.stored_run(3)
print(alone.title, "\n")
print(alone.accuracy_table())

# %%
figure, axis = figures.axes(width=5.6, height=2.2)
axis.plot(*zip(*alone.losses, strict=True), color=figures.TEXT)
axis.set(xlabel="step", ylabel="loss (nats a token)", yscale="log")
late = sum(loss for _, loss in alone.losses[-5:]) / 5
figures.show(figure, f"Loss of the stored run over {len(alone.losses)} steps, falling from {alone.losses[0][1]:.0f} at the "
                     f"first step to {late:.2g} on average over the last five.")

# %% [markdown]
# The loss is all that one could wish, and the new exam as well: both kinds of question are right on scenes that were never shown, and with a black image neither is. But look at the three rows below them.

# %%
old = {kind: alone.accuracy[kind] for kind in absent.KEPT}
kept = sum(row["after"] for row in old.values()) / len(old)
reveal("p_10_4", "c", because=", ".join(f"{kind} {row['before']:.2f} to {row['after']:.2f}" for kind, row in old.items())
                              + f"; on average {kept:.2f} are left.")

# %% [markdown]
# Forty steps in which every answer was a colour or a denial taught it that every answer is one. This is *catastrophic forgetting*. That LoRA leaves the old weights untouched does not help: they are there, and added to. The loss on new data cannot show it. An exam of old questions does.
#
# ### The remedy
#
# Keep asking the old questions. A second run puts up to three kinds of them behind the new ones: count, existence and size. Relations stay out, to see what becomes of a kind that nobody asks for.

# %%
mixed = stored.stored_run(3, variant="mixed")
print(mixed.work, "\n")
print(mixed.accuracy_table())

# %% [markdown]
# Now the new habit is learned and the old questions that were asked along are right as before. Relations, which nobody asked for, lost nearly half, though in longer training than before. So mixing protects what is in the mix, and an exam must hold what is not.

# %% [markdown]
# Two notes on the controls. *Swapped* gets more than half of the denials right because a shape that is missing here is often missing in another scene too. And these are single runs on 60 scenes, 30 for the old questions: they show large effects, not small ones.

# %% [markdown]
# The new questions before and after, in words:

# %%
print(mixed.answers_text())

# %% [markdown]
# ## What it cost
#
# Conversations a second mean little without the machine. So count the arithmetic of a step, measure the largest matrix product that this machine can do, and state the share. By the rule of `flops.py` a frozen weight counts 4 operations a token, a learning one 6, a forward pass alone 2.

# %% tags=["nbval-ignore-output"]
cost = lesson.numbers(job, reports, dollars_an_hour=None)      # put your own price here
live = lesson.found(choice.path, job, cost, losses, (before, said), (after, says))
print(live.title.replace("Stored run", "This run"), live.numbers_table(), sep="\n")
if choice.path < 3:
    stored.keep(live)                                          # so that a reader without a GPU sees it too

# %% [markdown]
# ### On a GPU
#
# The same cells on the other two paths, kept with their machine and date by the line above or by `python -m vlm_course.finetune.lesson`. First path 1, from a folder in the published layout. Its weights are random, since none could be had for this book: what a step costs does not depend on their values.

# %%
one = stored.stored_run(1)
print("\n".join([one.title, one.numbers_table(), *one.notes]) if one else stored.not_yet(1))

# %% [markdown]
# Twenty steps are few: the compiler's work for every new length of a row is in them. What a conversation costs in a long run stands further below.
#
# ### A language model learns to see
#
# Path 2: SmolLM2 has read much and never seen anything. Behind the tower of this course it is trained in LLaVA's two stages, first the bridge on captions, then all but the tower on questions of every kind.

# %%
two = stored.stored_run(2)
print("\n".join([two.title, two.numbers_table(), two.accuracy_table(), *two.notes]) if two else stored.not_yet(2))

# %%
if two:
    for one_of in two.answers[:4]:
        print(f"{one_of['question']}  (true: {one_of['truth']})\n  before  {one_of['before']}\n  after   {one_of['after']}")

# %% [markdown]
# Before, it writes sentences about a picture that it cannot use (cut where the true answer would end); afterwards it answers, and with a black or another scene's picture it is back at guessing. So it learned to see. Thanks to the trained tower? Look at the last column: the same training, seed and steps behind a tower that was never trained.

# %%
if two:
    random_tower = two.controls["random tower"]
    figure, axis = figures.axes(width=5.6, height=2.2)
    axis.plot(*zip(*two.losses, strict=True), color=figures.TEXT, label="trained tower")
    axis.plot(*zip(*random_tower, strict=True), color=figures.VISION, label="random tower")
    axis.set(xlabel="step", ylabel="loss (nats a token)", yscale="log", yticks=[0.25, 0.5, 1, 2], yticklabels=["0.25", "0.5", "1", "2"])
    axis.minorticks_off()
    axis.legend()
    ahead = [step for (step, mine), (_, other) in zip(two.losses, random_tower, strict=True) if mine < other]
    at = {step: (mine, other) for (step, mine), (_, other) in zip(two.losses, random_tower, strict=True)}
    last = max(step for step in at if step <= 200)
    figures.show(figure, f"Loss of both trainings. At step {last}, before the end of the first stage, the trained tower's "
                         f"is {at[last][0]:.2f} and the random tower's {at[last][1]:.2f}; both jump where the second stage brings new kinds of question, and "
                         f"from step {ahead[-1]} on the random tower's is no longer the higher one.")

# %% [markdown]
# In the first stage the language model is frozen: it can use what the bridge makes of the tower's vectors or not, and there the trained tower is far ahead. In the second all weights of the language model learn, and it learns to read the random vectors too. They hold the picture: a patch of 8 x 8 pixels is 192 numbers, and so is a vector of this tower. With plain shapes and fresh pictures in every step, that is enough. It says nothing about photographs, nor about few examples; both are one run each.
#
# Without this control one would have praised the tower for what the language model learned by itself.

# %% [markdown]
# ### How fast the engine is
#
# Training and answering at real sizes, with random weights, which cost the same time. The matrix peak and the speed of memory are measured in the same run; a *floor* is the time in which memory can read the weights once:

# %%
for line in stored.row_lines():
    print(line)

# %% [markdown]
# ### What each trick buys
#
# The engine computes the plain loss by quicker ways; its tests hold both to the same value and the same gradients. Each trick is measured against the same run without it, on a GPU:

# %%
for line in stored.speed_lines():
    print(line)

# %% [markdown]
# Whether they pay depends on the model and the machine, so a trick without a measurement is only an idea. `python -m benchmarks.finetune all` measures them and the usual programs beside them, in one run.

# %% [markdown]
# ## Saved so that others can load it
#
# A checkpoint that only your program reads is worth little. Merge LoRA, and write the layout in which LLaVA-1.5 is published: `config.json`, and `.safetensors` with the published names. Then transformers loads it without knowing of this course.

# %%
from transformers import LlavaForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from vlm_course.finetune.lora import has_lora, merge_lora
from vlm_course.finetune.published import save_published

disable_progress_bar()
tuned = job.model.eval()
print(len(merge_lora(tuned)) if has_lora(tuned) else 0, "layers merged")
tuned = tuned.to(tuned.vision.class_token.dtype)
save_published(tuned, folder / "checkpoint", adapter=job.adapter)
for file in sorted((folder / "checkpoint").glob("*.safetensors")):
    print(f"{file.name}: {file.stat().st_size / 1e6:.0f} MB")
theirs = LlavaForConditionalGeneration.from_pretrained(folder / "checkpoint", dtype=tuned.vision.class_token.dtype).eval().to(tuned.vision.class_token.device)

# %%
few = batch.part(0, 2).to(tuned.vision.class_token.device, dtype=tuned.vision.class_token.dtype)
with torch.no_grad():
    wanted = theirs(input_ids=few.ids, pixel_values=few.pixels).logits     # [2, T, V]
    got = tuned(few.ids, few.pixels)
near = 1e-4 if got.dtype == torch.float32 else 2e-2                        # 16 bits round
print(f"equal to {near:g} of the largest logit:", bool((wanted - got).abs().max() < near * wanted.abs().max()))
print("best words equal:", f"{100 * (wanted.argmax(-1) == got.argmax(-1)).float().mean():.0f} %")

# %% [markdown]
# And back into the course's class, bit for bit:

# %%
from vlm_course.convert.llava import load_llava

back = load_llava(folder / "checkpoint", dtype=got.dtype).state_dict()
same = [torch.equal(value.cpu(), back[name].cpu()) for name, value in tuned.state_dict().items()]
print(f"{sum(same)} of {len(same)} tensors are the same")

# %% [markdown]
# ## With your own data
#
# In a terminal the whole chapter is one command: `vlm-course finetune --help`. It takes a JSON or JSONL file or a folder of images with one, and a LLaVA-1.5 folder or `small`; where memory does not suffice it says which size of batch does, and a second call goes on where one stopped.

# %% [markdown]
# ## Where it fails
#
# What the model forgot, it forgot in silence: no error, a perfect loss. For coloured shapes we could ask every kind of question. For a real model nobody can, so keep an exam of what its users rely on, mix general data into your own, and compare with the model that you started from. The tower was frozen: what it cannot see, no such tuning teaches.

# %% [markdown]
# ## Check question
#
# Choose on the buttons to read the reason for each option, then return your letter below: that is the answer that counts.

# %%
question("q_10_1")

# %% exercise="q_10_1"
def q_10_1() -> str:
    """Return the letter of your answer."""
    ### BEGIN SOLUTION
    return "c"
    ### END SOLUTION

# %% check="q_10_1" points=1
check("q_10_1", globals())

# %% [markdown]
# ## What you built, and where it lives
#
# - `LoRALinear`, `merged_linear`, `lora_budget`: `vlm_course/finetune/lora.py`. In PEFT: `LoraLayer`, `merge_and_unload`.
# - the records and what is wrong with them: `finetune/data.py`; the engine: `finetune/engine.py`; its speed: `finetune/fast.py`.
# - the published layout: `finetune/published.py`; the choice of a path: `finetune/choose.py`.

# %% [markdown]
# **Read next.** Hu et al. 2021, *LoRA* (arXiv 2106.09685), section 4. Liu et al. 2024, *Improved Baselines with Visual Instruction Tuning* (arXiv 2310.03744), for the data and the rates of LLaVA-1.5. Dettmers et al. 2023, *QLoRA* (arXiv 2305.14314), where the frozen weights take 4 bits.

# %% [markdown]
# ## How sure were you?
#
# This is the last chapter. All your predictions of the course, by how sure you were. On the line you knew what you knew; below it you were too sure.

# %% tags=["nbval-ignore-output"]
from vlm_course.progress import calibration_plot

calibration_plot()
