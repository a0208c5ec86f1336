# %% [markdown] covers=["4-idea-1"]
# # Chapter 4: Visual instruction tuning
#
# The parts fit: tower, bridge, mask. What the model does with them is decided by its examples. This chapter makes such examples, marks which of their tokens are learned, packs them into rows, and measures what a model becomes on three different diets.

# %% [markdown]
# **By the end you can**
#
# - write LLaVA-1.5's conversation template, with the image where it stands;
# - label a conversation, end mark included, and compute its loss;
# - say which divisor a loss has, and what it weighs;
# - pack conversations into one row so that none sees another;
# - tell from measurements what captions teach, and what they do not.

# %%
from vlm_course.build.costs import measured

print("Reading and doing: about 120 minutes.")
print(measured("04_instruction_tuning"))

# %% [markdown]
# You need cross-entropy, and from chapter 3 the idea of a causal mask: each token sees itself and what stands before it.

# %% locked="imports"
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_course.chat import IGNORE, VICUNA_SYSTEM, Turns, encode_chat
from vlm_course.grading import check, part, question
from vlm_course.pretrained import load_small
from vlm_course.progress import predict, reveal
from vlm_course.simulations import figures

# %% [markdown]
# ## Predict first
#
# Three questions before anything runs. Your answers stay in a file on this computer.

# %%
predict("p_4_1", "In LLaVA-1.5's prompt, the image stands ...",
        {"a": "at the very start", "b": "behind the system text, in front of the question", "c": "behind the question"})

# %%
predict("p_4_2", "Visual tokens have no label, so they carry no loss. The gradient that reaches the bridge is ...",
        {"a": "exactly zero", "b": "not zero, but far smaller than that of the language model's layers",
         "c": "not zero, and of the same order as theirs, or greater"})

# %%
predict("p_4_3", "A model is tuned on captions alone, then asked for the colour of the one star in an image. Among such "
        "answers the right ones are ...",
        {"a": "about as many as with a model tuned on questions: the colour is in its captions",
         "b": "more than the most frequent answer would get, yet clearly fewer than that",
         "c": "no more than the most frequent answer would get"})

# %% [markdown] covers=["4-idea-1", "4-walkthrough-1"]
# ## One image, many instructions
#
# An example for visual instruction tuning has three parts: an image, an instruction, and the response that it asks for. The model that comes with the course was tuned on ten kinds. All ten about one scene, answered now:

# %% covers=["4-idea-1", "4-walkthrough-1"]
from vlm_course.simulations.instruction_diversity import InstructionExperiment

small = load_small()
experiment = InstructionExperiment({"shipped": small.model}, small.tokenizer)
scene = 3
for kind in experiment.kinds[:-1]:
    reply = experiment.reply("shipped", scene, kind)
    print(f"{kind:10s} {reply.question:58s} {reply.says}")

# %%
figure, axis = figures.axes(width=2.4, height=2.4)
figures.draw_scene(axis, experiment.pixels[scene])
figures.show(figure, f"The scene that was asked about: {'; '.join(experiment.world.describe(scene))}.")

# %% [markdown] covers=["4-walkthrough-1"]
# The way of one answer: pixels become visual tokens, the tokens stand in a prompt, the language model continues it word by word. Numbers of a point or a box count from 0 to 255 over the image.

# %% covers=["4-walkthrough-1"]
pixels = experiment.pixels[scene][None]                      # [1, 3, 96, 96]
visual = small.model.encode_images(pixels)                   # [1, 3, 96, 96] -> [1, M, D]
asked = experiment.reply("shipped", scene, "colour")
ids, _ = encode_chat(small.tokenizer, [(asked.question, None)], visual.shape[1])
logits = small.model(torch.tensor([ids]), image_features=visual)  # [1, T] -> [1, T, V]
best = logits[0, -1].argmax().item()
print(f"{tuple(pixels.shape)} -> {tuple(visual.shape)} -> {len(ids)} ids -> {tuple(logits.shape)}")
print(f"{asked.question}  first word of the answer: {small.tokenizer.pieces[best]}")

# %% [markdown] covers=["4-idea-2"]
# ## A teacher who never sees the image
#
# Where do such examples come from? LLaVA let GPT-4, which then read only text, write them: it got five captions of a photograph and, for two of three kinds, the boxes of its objects. We do the same with our world, whose captions and boxes are exact. This is all that the teacher knows:

# %% covers=["4-idea-2"]
from vlm_course.worlds.dialogs import Dialogs

dialogs = Dialogs(small.tokenizer, canonical=True)
generator = torch.Generator().manual_seed(4)
caption = small.tokenizer.decode(dialogs.captions(experiment.world)[scene])
print(caption)
for name, box in zip(experiment.world.describe(scene), experiment.world.box[scene] / 96, strict=False):
    print(f"{name}: {[round(x, 3) for x in box.tolist()]}")

# %% [markdown] covers=["4-idea-2"]
# From these lines it writes the three kinds that LLaVA has: a conversation, a description, and a question that needs a conclusion. Our teacher is a program, so its answers are exact and its wording is poor. GPT-4's wording was rich, and its answers only as good as the captions.

# %% covers=["4-idea-2"]
for title, kinds in {"conversation": ("colour", "count", "existence"), "description": ("caption",),
                     "conclusion": ("relation", "check")}.items():
    print(title)
    for kind in kinds:
        turn = dialogs.ask(experiment.world[[scene]], kind, generator=generator)  # no pixels go in
        print("   ", small.tokenizer.decode(turn.question[0]), "->", small.tokenizer.decode(turn.answer[0]))

# %% [markdown] covers=["4-idea-2"]
# The published prompts show details that summaries lose. The examples for *conversation* hold captions only; boxes come with *description* and *reasoning*. And of the 158,000 samples, 58,000 are conversations, 23,000 descriptions, 77,000 reasoning. (The file's name says 150k.)

# %% [markdown] covers=["4-idea-2"]
# A teacher who reads symbols repeats their gaps. Leave one object out of every caption, let somebody who knows only that caption answer, and compare with the truth:

# %% covers=["4-idea-2"]
from vlm_course.studies.instruction_mix import answer_from_caption
from vlm_course.worlds.scenes import sample

many = sample(400, generator=generator, objects=(2, 4))
full = [small.tokenizer.decode(row) for row in dialogs.captions(many)]
gap = [", ".join(text.rstrip(".").split(", ")[:-1]) + "." for text in full]  # without the last object
for kind in ("colour", "size", "existence"):
    turns = dialogs.ask(many, kind, generator=generator)
    asked = [(small.tokenizer.decode(q), a, b) for q, a, b, ok in zip(turns.question, full, gap, turns.valid, strict=True) if ok]
    wrong = sum(answer_from_caption(q, b) != answer_from_caption(q, a) for q, a, b in asked) / len(asked)
    print(f"{kind:10s} {wrong:.0%} of {len(asked)} answers are wrong or missing")

# %% [markdown]
# About questions of colour and size the teacher fell silent; about existence it said *no*, in good faith. A model trained on that learns to deny what it sees. No later step can tell such a label from a true one.

# %% [markdown] covers=["4-table-1"]
# ## Three diets, measured
#
# The lesson has a table of what captions, questions and instructions teach. Here is the experiment. One tiny model (its decoder is an eighth of the shipped one's) first reads conversations without images; then it is tuned, on the same scenes and for as many steps, on one of three diets.

# %% covers=["4-table-1"]
from vlm_course.studies.results import load_results

study = load_results("instruction-mix")
for name, says in study.variants.items():
    print(f"{name:13s} {says}")
print(study.note())

# %% [markdown] covers=["4-table-1"]
# Then each is asked every kind of question about new scenes. Right answers, mean over the seeds, for the mixed diet also seed by seed. Two controls: the mixed diet's model with another scene's image, and the most frequent answer. The last row asks what no diet held: to count by size.

# %% covers=["4-table-1"]
diets = tuple(study.variants)
kinds = tuple(study.record["variants"][diets[0]]["measures"]["exam"])
print(f"{'':15s}" + "".join(f"{name:>14s}" for name in diets) + f"{'by seed':>18s}{'other image':>13s}{'most frequent':>15s}")
for kind in kinds:
    row = "".join(f"{study.mean(name, 'exam', kind, 'model'):14.2f}" for name in diets)
    seeds = " ".join(f"{value:.2f}" for value in study.value("instructions", "exam", kind, "model")["values"])
    other = study.mean("instructions", "exam", kind, "swapped")
    control = study.record["variants"][diets[0]]["measures"]["exam"][kind].get("majority")
    print(f"{kind:15s}{row}{seeds:>18s}{other:13.2f}" + (f"{control['mean']:15.2f}" if control else ""))

# %% covers=["4-table-1"]
figure, axis = figures.axes(width=6.4, height=2.1)
table = torch.tensor([[study.mean(name, "exam", kind, "model") for kind in kinds] for name in diets], dtype=torch.float64)
axis.imshow(table, vmin=0, vmax=1, aspect="auto")
axis.set(yticks=range(3), yticklabels=diets, xticks=range(len(kinds)))
axis.set_xticklabels(kinds, rotation=35, ha="right")
for row, column in torch.cartesian_prod(torch.arange(3), torch.arange(len(kinds))).tolist():
    value = table[row, column].item()
    axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value < 0.5 else "black")
words = "; ".join(f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in zip(kinds, row.tolist(), strict=True))
                  for name, row in zip(diets, table, strict=True))
figures.show(figure, f"Share of right answers by diet (rows) and kind of question (columns). {words}.")

# %% [markdown] covers=["4-table-1"]
# A wrong answer can be of two sorts: the right form with the wrong content, or another form altogether. So also count the answers that *look* like what was asked for (a colour word for a colour, four numbers for a box), and how long answers are.

# %% covers=["4-table-1"]
print(f"{'':15s}{'answers in the form asked for':>42s}{'mean length in tokens':>42s}")
print(f"{'':15s}" + "".join(f"{name:>14s}" for name in 2 * diets))
for kind in kinds:
    form = "".join(f"{study.mean(name, 'exam', kind, 'form'):14.2f}" for name in diets)
    length = "".join(f"{study.mean(name, 'length', kind):14.1f}" for name in diets)
    print(f"{kind:15s}{form}{length}")

# %% [markdown] covers=["4-table-1"]
# Read the tables by columns. Tuned on captions, the model answers *every* question in the words of a caption. Tuned on short questions, it answers everything in one word, even "describe the image". Each learned one form, though the conversations that it read before its tuning held all ten kinds. Only the mixed diet keeps all ten. At short questions two of its seeds come close to the diet of questions; the third has learned less, and *existence* not at all.

# %% [markdown] covers=["4-table-1"]
# Look at *relation* and *check* too. The diet of questions holds both, and yet its model answers them at chance; the mixed diet, with fewer of them, gets most right. There, points and boxes ask *where* an object is, so one skill may have taught the other. That is a guess: this study does not take the kinds apart, and the seed that learned less did not learn relations either. And at *count by size*, which no diet held, none gets beyond the most frequent answer: the right form came along, the skill did not.

# %% [markdown] covers=["4-table-1"]
# Is the model on captions blind, or does it only not listen? Let it describe the image, and look the answer up in *its own* caption:

# %% covers=["4-table-1"]
print(f"{'':12s}{'asked directly':>16s}{'from its own caption':>24s}{'most frequent':>16s}")
for kind in ("colour", "shape", "size", "existence"):
    direct, control = (study.mean("captions", "exam", kind, column) for column in ("model", "majority"))
    print(f"{kind:12s}{direct:16.2f}{study.mean('captions', 'from own caption', kind):24.2f}{control:16.2f}")
asked, rival, often = (study.mean(d, "exam", "colour", c) for d, c in
                       (("captions", "model"), ("questions", "model"), ("captions", "majority")))
study.reveal("p_4_3", "a" if asked > rival - 0.05 else "b" if asked > often + 0.05 else "c",
             because=f"Right answers about colour: {asked:.2f}; tuned on questions {rival:.2f}; most frequent {often:.2f}.")

# %% [markdown] covers=["4-table-1"]
# Read the three trained models yourself: the same scene and questions as above, from the weights of one seed each. Compare with the scene: asked for anything but a caption, the first one's words need not be about the image.

# %% covers=["4-table-1"]
tuned = {name: study.load(name, small) for name in diets}
trio = InstructionExperiment({"shipped": small.model} | tuned, small.tokenizer)
for kind in ("colour", "existence", "box", "caption"):
    print(trio.reply("shipped", scene, kind).question)
    for name in diets:
        print(f"    {name:13s} {trio.reply(name, scene, kind).says[:70]}")

# %% [markdown] covers=["4-table-1"]
# Train them again here: a rehearsal takes a minute or two and shows the form, not the result. With a GPU the whole study takes a few minutes. Nothing starts before you click.

# %% tags=["nbval-ignore-output"]
from vlm_course.studies.rerun import rerun

rerun("instruction-mix")

# %% [markdown] covers=["4-walkthrough-2"]
# ## The prompt, and the true place of the image
#
# A model is tuned with one exact text around questions and answers, and later expects it to the letter. LLaVA-1.5 uses Vicuna's: a system text, then `USER:` and `ASSISTANT:` in turn, and `</s>` behind every answer. The image is the string `<image>` in the first question.

# %% [markdown] covers=["4-walkthrough-2"]
# ### Build It: the conversation template  ·  medium  ·  about 15 minutes  ·  4 points
#
# Write `vicuna_prompt(turns, image, system)`. For a system text *S* and one turn it is `S USER: <image>⏎question ASSISTANT: answer</s>` (⏎ a line end); further turns follow without a space. An answer `None` leaves the prompt open, ending in `ASSISTANT:`. Also return, for each answer, where it begins and where its `</s>` ends, in characters.
#
# <details><summary>Hint 1</summary>Grow one string from left to right; len(text) is always the place of the next character.</details>
# <details><summary>Hint 2</summary>Only the first question gets &lt;image&gt; and a line end in front, and only if image is true. A turn without an answer ends at the colon.</details>
# <details><summary>Hint 3</summary>Write the space, remember start = len(text), then add answer + "&lt;/s&gt;" and append (start, len(text)).</details>

# %% exercise="vicuna_prompt" twin="vlm_course.chat.vicuna_prompt" covers=["4-walkthrough-2"]
def vicuna_prompt(
    turns: Turns, image: bool = True, system: str = VICUNA_SYSTEM
) -> tuple[str, list[tuple[int, int]]]:
    """LLaVA-1.5's prompt and the spans of its answers, each with its </s>: (text, [(start, end), ...])."""
    ### BEGIN SOLUTION
    text, spans = system + " ", []
    for number, (asked, answer) in enumerate(turns):
        placeholder = "<image>\n" if image and number == 0 else ""
        text += f"USER: {placeholder}{asked} ASSISTANT:"
        if answer is not None:
            start = len(text) + 1  # behind the space
            text += f" {answer}</s>"
            spans.append((start, len(text)))
    return text, spans
    ### END SOLUTION

# %% check="vicuna_prompt" points=4 covers=["4-walkthrough-2"]
check("vicuna_prompt", globals())

# %% covers=["4-walkthrough-2"]
vicuna_prompt = part("vicuna_prompt", globals())
text, spans = vicuna_prompt([("What animal is this?", "A golden retriever."), ("Is it asleep?", "No.")])
print(text)
print([text[start:end] for start, end in spans])
before = text[: text.index("<image>")]
reveal("p_4_1", "b", because=f"{len(before.split())} words stand before it, the first question behind it.")

# %% [markdown] covers=["4-walkthrough-2"]
# The lesson draws the image first, then the system text. In LLaVA-1.5 the system text comes first, so visual tokens can attend to it; the question comes after, so they cannot attend to that. Both halves can be measured. The shipped model, some words before the image, a question behind:

# %% covers=["4-walkthrough-2", "4-idea-3"]
tok, M = small.tokenizer, visual.shape[1]

def at_the_image(words: str, question: str) -> Tensor:
    ids = [tok.bos_id, *tok.encode(words), *[tok.image_id] * M, tok.user_id, *tok.encode(question), tok.assistant_id]
    with torch.no_grad():
        logits = small.model(torch.tensor([ids]), image_features=visual)  # [1, T, V]
    return logits[0, torch.tensor(ids) == tok.image_id]                   # [M, V]

plain = at_the_image("what do you see", "what color is the star?")
print("other question: largest change", (plain - at_the_image("what do you see", "is it large?")).abs().max().item())
print(f"other words before: {(plain - at_the_image('count the red', 'what color is the star?')).abs().max().item():.2g}")

# %% [markdown] covers=["4-idea-3"]
# Another question moves the visual tokens by exactly zero: under a causal mask nothing flows from right to left. So the image is read before the question is known, and whatever the question needs must already be in the tokens. Words *before* the image do move them.

# %% [markdown] covers=["4-walkthrough-2"]
# ## Which tokens are learned
#
# The spans are in characters; a model reads tokens. Cut the text with a toy rule (Vicuna's tokenizer cuts otherwise, the order is the same). Mind the space: many tokenizers make it part of the word that follows.

# %% covers=["4-walkthrough-2"]
import re

cut = [(piece.group(), piece.span()) for piece in re.finditer(r" ?<image>|</s>|\n| ?\w+| ?[^\w\s]", text)]
pieces, offsets = [piece for piece, _ in cut], [place for _, place in cut]
first = pieces.index(" A", 30)
print(pieces[first - 4 : first + 7])
print("the answer begins at", spans[0][0], "and the token", repr(pieces[first]), "covers", offsets[first])

# %% [markdown] covers=["4-walkthrough-2"]
# ### Build It: labels  ·  medium  ·  about 10 minutes  ·  3 points
#
# Write `response_labels(ids, offsets, spans)`: one label a token, its own id if it covers any character of a response, else -100, which PyTorch's cross-entropy ignores. Do not shift anything.
#
# <details><summary>Hint 1</summary>Go through the tokens one by one: its label is its own id if it belongs to a response, else -100.</details>
# <details><summary>Hint 2</summary>A tokenizer may glue the space before an answer to its first word, so that token begins before the span.</details>
# <details><summary>Hint 3</summary>Two stretches share a character exactly when each starts before the other ends: start &lt; last and end &gt; first.</details>

# %% exercise="response_labels" twin="vlm_course.chat.response_labels" covers=["4-walkthrough-2"]
def response_labels(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> list[int]:
    """The labels of a tokenised conversation: ids in the responses, -100 (IGNORE) elsewhere."""
    ### BEGIN SOLUTION
    labels = []
    for token, (start, end) in zip(ids, offsets, strict=True):
        learned = any(start < last and end > first for first, last in spans)
        labels.append(token if learned else IGNORE)
    return labels
    ### END SOLUTION

# %% check="response_labels" points=3 covers=["4-walkthrough-2"]
check("response_labels", globals())

# %% covers=["4-walkthrough-2"]
response_labels = part("response_labels", globals())
labels = response_labels(list(range(len(pieces))), offsets, spans)
print("learned:", [piece for piece, label in zip(pieces, labels, strict=True) if label != IGNORE])
M_real, words = 576, sum("<image>" not in piece for piece in pieces)
learned = sum(label != IGNORE for label in labels)
print(f"with {M_real} visual tokens: {M_real + words} positions, {learned} of them learned")

# %% [markdown]
# `</s>` is learned too. Mask it, and the model never learns to stop. (That happens by accident where the padding token is the end token, and padding is masked by its id.)

# %% covers=["4-walkthrough-2"]
from matplotlib.patches import Patch

row = [0 if "<image>" in p else 2 if label != IGNORE else 1 for p, label in zip(pieces, labels, strict=True)]
strip = [kind for kind in row for _ in range(M_real if kind == 0 else 1)]  # <image> becomes 576 positions
figure, axis = figures.axes(width=6.8, height=1.1)
colours = (figures.VISION, figures.TEXT_LIGHT, figures.TEXT)
for place, kind in enumerate(strip):
    axis.axvspan(place, place + 1, color=colours[kind], linewidth=0)
axis.set(xlim=(0, len(strip)), yticks=[], xlabel="position")
names = ("image: no label", "system text and questions: no label", "answers: learned")
axis.legend([Patch(color=c) for c in colours], names, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
start = strip.index(0)
figures.show(figure, f"{len(strip)} positions of a conversation: {start} of text, {M_real} of the image, then questions and answers; only {learned} near the end are learned.")

# %% [markdown] covers=["4-derivation-1"]
# ## The loss
#
# Every token gets a probability given those before it. Plain language modelling takes the mean of −log *P* over all of them. Instruction tuning keeps the tokens of the response. With *m* = 1 in the response and 0 elsewhere, and *T* the sum of *m*:
#
# $$L = -\frac{1}{T}\sum_i m_i \log P(x_i \mid x_{<i})$$

# %% [markdown] covers=["4-derivation-1"]
# ### Derivation: the instruction tuning loss  ·  easy  ·  about 10 minutes  ·  3 points
#
# Write `instruction_loss(log_probs, mask)` for one sequence: `log_probs` `[N]` holds log *P* of every token, `mask` `[N]` the *m* as 0.0 and 1.0.
#
# <details><summary>Hint 1</summary>Without a mask the loss is the mean of -log P over all tokens. Which tokens is the model meant to produce?</details>
# <details><summary>Hint 2</summary>Multiply every log-probability by m_i, 1 in the response and 0 elsewhere, before you sum.</details>
# <details><summary>Hint 3</summary>Divide by how many tokens are left, mask.sum(), not by len(mask).</details>

# %% exercise="instruction_loss" twin="vlm_course.loss.instruction_loss" covers=["4-derivation-1"]
def instruction_loss(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Mean of -log P over the tokens with mask 1: [N], [N] -> a scalar."""
    ### BEGIN SOLUTION
    return -(log_probs * mask).sum() / mask.sum()
    ### END SOLUTION

# %% check="instruction_loss" points=3 covers=["4-derivation-1"]
check("instruction_loss", globals())

# %% covers=["4-derivation-1"]
instruction_loss = part("instruction_loss", globals())
probabilities = torch.tensor([0.9, 0.2, 0.5, 0.5, 0.25])  # of five tokens; the last three are the response
mask = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
by_hand = -(torch.tensor(0.5).log() + torch.tensor(0.5).log() + torch.tensor(0.25).log()) / 3
print(f"{instruction_loss(probabilities.log(), mask):.4f}  by hand {by_hand:.4f}")

# %% [markdown] covers=["4-derivation-1"]
# A model gives logits `[B, T, V]`, and the logits *at* position *t* are a guess about token *t + 1*. Somebody has to shift by one, exactly once: in this course, as in transformers, the loss does.
#
# ### Build It: the response loss  ·  medium  ·  about 15 minutes  ·  4 points
#
# Write `response_loss(logits, labels, ignore, count)` with unshifted labels `[B, T]`. `count`, where given, replaces the number of response tokens as divisor.
#
# <details><summary>Hint 1</summary>The logits at position t are a guess about token t + 1. The last logits guess about nothing we have.</details>
# <details><summary>Hint 2</summary>So compare logits[:, :-1] with labels[:, 1:], both flattened: [B * (T - 1), V] and [B * (T - 1)].</details>
# <details><summary>Hint 3</summary>F.cross_entropy(..., ignore_index=ignore, reduction="sum"), divided by the number of targets that are not ignore, or by count where one is given.</details>

# %% exercise="response_loss" twin="vlm_course.loss.response_loss" covers=["4-derivation-1"]
def response_loss(logits: Tensor, labels: Tensor, ignore: int = -100, count: int | Tensor | None = None) -> Tensor:
    """Mean cross-entropy over response tokens: logits [B, T, V], unshifted labels [B, T] -> a scalar."""
    ### BEGIN SOLUTION
    predictions = logits[:, :-1].flatten(0, 1).float()  # [B, T, V] -> [B * (T - 1), V]
    targets = labels[:, 1:].flatten()  # [B, T] -> [B * (T - 1)]
    total = F.cross_entropy(predictions, targets, ignore_index=ignore, reduction="sum")
    return total / ((targets != ignore).sum() if count is None else count)
    ### END SOLUTION

# %% check="response_loss" points=4 covers=["4-derivation-1"]
check("response_loss", globals())

# %% [markdown]
# Compare with torch on tokens shifted by hand, and see what happens without the shift. (The package's tests compare with transformers' `ForCausalLMLoss`, which takes unshifted labels too.) One conversation, and the model of the diet of questions, which has to guess relations; the shipped one is so sure that its loss is nearly 0:

# %% covers=["4-derivation-1"]
response_loss = part("response_loss", globals())
talk = [(trio.reply("shipped", scene, kind).question, trio.reply("shipped", scene, kind).wanted) for kind in kinds[:6]]
chat_ids, chat_labels = (torch.tensor([row]) for row in encode_chat(tok, talk, M))  # [1, T]
with torch.no_grad():
    logits = tuned["questions"](chat_ids, pixels)                                   # [1, T] -> [1, T, V]
by_hand = F.cross_entropy(logits[0, :-1], chat_labels[0, 1:])  # position t against token t + 1; -100 is ignored
print(f"ours {response_loss(logits, chat_labels):.3f}   by hand {by_hand:.3f}")
unshifted = F.cross_entropy(logits[0], chat_labels[0])
print(f"without the shift {unshifted:.2f}: the right next token is scored as the present one")

# %% [markdown] covers=["4-derivation-1"]
# ### What the divisor weighs
#
# The lesson divides by *T*, not by the whole length *N*, since otherwise the gradient would all but vanish. By how much does it shrink?
#
# ### Derivation: the wrong divisor  ·  easy  ·  about 5 minutes  ·  1 point
#
# Write `division_factor(context_tokens, response_tokens)`: the loss divided by *N*, over the loss divided by *T*.
#
# <details><summary>Hint 1</summary>Write both losses: the same sum, once over N and once over T. Divide the first by the second.</details>
# <details><summary>Hint 2</summary>N counts every token of the sequence, those of the response included.</details>
# <details><summary>Hint 3</summary>The sum cancels: T / N with N = context_tokens + response_tokens.</details>

# %% exercise="division_factor" twin="vlm_course.loss.division_factor" covers=["4-derivation-1"]
def division_factor(context_tokens: int, response_tokens: int) -> float:
    """(sum / N) / (sum / T), with N the tokens of the whole sequence and T those of the response."""
    ### BEGIN SOLUTION
    return response_tokens / (context_tokens + response_tokens)
    ### END SOLUTION

# %% check="division_factor" points=1 covers=["4-derivation-1"]
check("division_factor", globals())

# %% [markdown] covers=["4-derivation-1"]
# Smaller, for the lesson's lengths, but far from nothing. And does it matter to the optimizer that tunes such models? Adam divides the gradient by its own running size. One step of both, on a copy of the tiny model:

# %% covers=["4-derivation-1"]
from vlm_course.studies.tiny import tiny_llava

division_factor = part("division_factor", globals())
features = small.model.vision.patch_features(pixels, layer=small.model.config.feature_layer)  # [1, N, D_vision]

def step(divisor: int | None, optimizer) -> Tensor:
    model = tiny_llava(small, seed=0)
    weight = model.decoder.blocks[0].mlp.up.weight
    before, run = weight.detach().clone(), optimizer(model.decoder.parameters(), lr=1e-3)
    logits = model(chat_ids, image_features=model.bridge(features))
    response_loss(logits, chat_labels, count=divisor).backward()
    run.step()
    return weight.detach() - before  # [D_mlp, D]

# %% covers=["4-derivation-1"]
T_response, N_all = int((chat_labels[:, 1:] != IGNORE).sum()), chat_ids.shape[1]
print(f"T / N here: {division_factor(N_all - T_response, T_response):.3f}   "
      f"lesson, 576 + 50 + 50 tokens: {division_factor(626, 50):.3f}")
for name, optimizer in (("plain gradient", torch.optim.SGD), ("Adam", torch.optim.AdamW)):
    right, wrong = step(None, optimizer), step(N_all, optimizer)
    print(f"{name:15s} step with N as long as {wrong.norm() / right.norm():.3f} of the step with T")

# %% [markdown]
# The plain gradient shrinks by exactly *T / N*; Adam takes (almost) the same step. So the wrong divisor does not stop the learning. Its harm is another: *N* contains the prompt, so two equal answers weigh differently because one question was longer.

# %% [markdown] covers=["4-derivation-1"]
# ### Derivation: who counts how much  ·  easy  ·  about 10 minutes  ·  2 points
#
# A batch has several conversations. The mean runs over *all* its response tokens. Write `answer_weights(lengths)`: the weight of each conversation's own mean loss in the batch loss.
#
# <details><summary>Hint 1</summary>Write the batch loss as one sum over all response tokens, divided by their number.</details>
# <details><summary>Hint 2</summary>A conversation's own mean loss times its length is its part of that sum.</details>
# <details><summary>Hint 3</summary>The weight is its number of response tokens over the number in the whole batch.</details>

# %% exercise="answer_weights" twin="vlm_course.loss.answer_weights" covers=["4-derivation-1"]
def answer_weights(lengths: Sequence[int]) -> list[float]:
    """Weights that add up to 1, one for each number of response tokens."""
    ### BEGIN SOLUTION
    total = sum(lengths)
    return [length / total for length in lengths]
    ### END SOLUTION

# %% check="answer_weights" points=2 covers=["4-derivation-1"]
check("answer_weights", globals())

# %% covers=["4-derivation-1"]
answer_weights = part("answer_weights", globals())
pair = [encode_chat(tok, [talk_], M) for talk_ in (talk[4], ("describe the image.", caption))]
losses, lengths = [], []
for row_ids, row_labels in pair:
    with torch.no_grad():
        row_logits = tuned["questions"](torch.tensor([row_ids]), pixels)
    losses.append(response_loss(row_logits, torch.tensor([row_labels])).item())
    lengths.append(sum(label != IGNORE for label in row_labels))
weights = answer_weights(lengths)
print("tokens", lengths, " losses", [round(x, 2) for x in losses], " weights", [round(w, 2) for w in weights])
print(f"batch loss {sum(w * x for w, x in zip(weights, losses, strict=True)):.2f}, mean of the two {sum(losses) / 2:.2f}")

# %% [markdown]
# The caption counts more than five times as much as the *no*. That is how transformers' loss and LLaVA's training weigh; whoever wants each conversation to count the same must divide otherwise. Neither is wrong, but they are not the same training.

# %% [markdown] covers=["4-derivation-1"]
# ## No label, and yet a gradient
#
# The lesson's listing says of the visual tokens: loss 0, no gradient. The first half is true. For the second, take a fresh bridge in front of the shipped decoder, as in stage 1, one conversation, and ask autograd:

# %% covers=["4-derivation-1"]
from vlm_course.bridges import VisionProjection

torch.manual_seed(0)
bridge = VisionProjection(192, 256)       # untrained: it has everything to learn
tokens = bridge(features)                 # [1, N, D_vision] -> [1, N, D]
tokens.retain_grad()
logits = small.model(chat_ids, image_features=tokens)
logits.retain_grad()                      # the frozen decoder still passes gradients through
loss = response_loss(logits, chat_labels)
loss.backward()
at_image = chat_ids[0] == tok.image_id
print("gradient of the loss at the logits of visual positions:", logits.grad[0, at_image].abs().max().item())
print(f"loss {loss.item():.2f}; length of the gradient at the visual tokens themselves {tokens.grad.norm():.2g}, "
      f"at the bridge's first matrix {bridge.mlp[0].weight.grad.norm():.3g}")

# %% [markdown] covers=["4-derivation-1"]
# Zero where the label is missing: nobody asks what comes after a patch. Not zero at the visual tokens: the response attends to them, and the gradient goes back the same way. It is the only way; a bridge whose gradient were zero could not learn. Compare sizes over the parts of an untrained model:

# %% covers=["4-derivation-1"]
fresh = tiny_llava(small, seed=1)
response_loss(fresh(chat_ids, image_features=fresh.bridge(features)), chat_labels).backward()
sizes = {}
for name, parameter in fresh.named_parameters():
    if parameter.grad is not None and parameter.dim() == 2:
        place = name.split(".")[0] if name.startswith("bridge") else ".".join(name.split(".")[1:3]).removesuffix(".weight")
        sizes.setdefault(place, []).append(parameter.grad.norm().item() / parameter.detach().norm().item())
for name, values in sizes.items():
    print(f"{name:16s} gradient over weight, mean of its matrices: {sum(values) / len(values):.2g}")

# %%
blocks = [sum(v) / len(v) for name, v in sizes.items() if "blocks" in name]
own, theirs = sum(sizes["bridge"]) / len(sizes["bridge"]), sum(blocks) / len(blocks)
reveal("p_4_2", "a" if own == 0 else "b" if own < theirs / 10 else "c",
       because=f"Gradient over weight: bridge {own:.2g}, the decoder's blocks {theirs:.2g} on average.")

# %% [markdown] covers=["4-derivation-1"]
# ### Why visual tokens have no label
#
# Often one reads: because predicting the next patch would be a regression, for which the head was not made. The simpler reason: cross-entropy needs an id to compare with, and a continuous vector has none. What stands at those positions is the id of `<image>`, 144 times. Learn that, and the model learns to say `<image>`:

# %% covers=["4-derivation-1"]
probe = tiny_llava(small, seed=2)
optimizer = torch.optim.AdamW([*probe.bridge.parameters(), *probe.decoder.parameters()], lr=4e-3)
for number in range(12):
    loss = response_loss(probe(chat_ids, image_features=probe.bridge(features)), chat_ids)  # every id a label
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if number % 4 == 3:
        print(f"step {number + 1:2d}: loss on everything {loss.item():.2f}")
with torch.no_grad():
    likely = probe(chat_ids, image_features=probe.bridge(features))[0, at_image].softmax(-1)[:, tok.image_id]  # [M]
print(f"probability of <image> at visual positions: {likely.mean():.2f}")

# %% [markdown]
# The loss falls fast and says nothing about any patch. Models whose images *are* ids (Chameleon) or who regress them on purpose (Emu) do train on images; then the objective exists.

# %% [markdown] covers=["4-derivation-1"]
# Nor does the mask tell instruction tuning from what came before. LLaVA's first stage trains on captions, and masks the image there as well. Your `response_labels` does for both:

# %% covers=["4-derivation-1"]
from vlm_course.chat import caption_prompt

stage_1, span = caption_prompt("a small black cross, a large teal circle.")
cut = [(piece.group(), piece.span()) for piece in re.finditer(r"<image>|\n| ?\w+| ?[^\w\s]", stage_1)]
stage_labels = response_labels(list(range(len(cut))), [place for _, place in cut], span)
print([piece if label != IGNORE else f"({piece})" for (piece, _), label in zip(cut, stage_labels, strict=True)])

# %% [markdown]
# In brackets what has no label: the image alone. What changes from stage 1 to stage 2 is the data, and which parts may learn.

# %% [markdown]
# ## Packing without leaks
#
# Conversations differ in length, and a batch is a rectangle. Padding fills it with nothing. Sixteen conversations of one to eight turns; every other one is about an image, as LLaVA-1.5's data mixes images with plain text:

# %%
from vlm_course.packed import pack, packed_logits

drawn = sample(16, generator=torch.Generator().manual_seed(5), objects=(2, 4))
speaker, documents = Dialogs(tok), []
for row in range(16):
    turns = speaker.several(drawn[[row]], 1 + row // 2, torch.ones(10), generator=generator)
    row_ids, row_labels = speaker.conversation(turns, visual_tokens=M * (row % 2))
    length = int((row_ids != tok.pad_id).sum())
    documents.append((row_ids[0, :length].tolist(), row_labels[0, :length].tolist()))
sizes = [len(row_ids) for row_ids, _ in documents]
print("tokens:", sizes)
print(f"padded to the longest: {sum(sizes) / (16 * max(sizes)):.0%} of the positions hold a token")

# %% [markdown]
# Put several into one row instead. Three things must be right, or they leak: no token sees another document, no document's first token is learned (its neighbour's last token would predict it), and positions begin anew.
#
# ### Build It: packing without leaks  ·  hard  ·  about 20 minutes  ·  5 points
#
# Write `pack_row(ids, labels)`: lists of documents in, four flat lists out: ids, labels (unshifted, the first of each document -100), the number of each token's document from 0, and positions that restart.
#
# <details><summary>Hint 1</summary>Four lists grow together: one entry each for every token. Go document by document.</details>
# <details><summary>Hint 2</summary>The loss shifts: the label at the first place of a document is scored on the last token of the one before.</details>
# <details><summary>Hint 3</summary>labels: [-100, *labels[1:]]; document number: [number] * len(ids); positions: range(len(ids)).</details>

# %% exercise="pack_row" twin="vlm_course.packed.pack_row"
def pack_row(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Documents one behind the other -> (ids, labels, document numbers, positions)."""
    ### BEGIN SOLUTION
    row, targets, documents, positions = [], [], [], []
    for number, (tokens, learned) in enumerate(zip(ids, labels, strict=True)):
        row += tokens
        targets += [IGNORE, *learned[1:]]
        documents += [number] * len(tokens)
        positions += range(len(tokens))
    return row, targets, documents, positions
    ### END SOLUTION

# %% check="pack_row" points=5
check("pack_row", globals())

# %% [markdown]
# The document numbers become a mask, by `block_mask` of chapter 3. Three short documents:

# %%
from vlm_course.attention import block_mask

pack_row = part("pack_row", globals())
_, toy_labels, numbers, positions = pack_row([[5, 6, 7], [8, 9], [4, 3, 2, 1]], [[5, 6, 7], [8, 9], [-100, 3, 2, 1]])
print("documents", numbers, " positions", positions, " labels", toy_labels)
figure, axis = figures.axes(width=2.6, height=2.4)
axis.imshow(block_mask(torch.tensor([numbers]))[0, 0], cmap="Blues", vmin=0, vmax=1.3)
axis.set(xlabel="key", ylabel="query", xticks=range(9), yticks=range(9))
figures.show(figure, "Attention mask of a packed row of three documents of 3, 2 and 4 tokens: three triangles along the diagonal, nothing outside them.")

# %% [markdown]
# Now the sixteen conversations, in rows of 600 tokens, through the shipped model; and each alone. `pack` lays the rows out with your function's rules; `packed_logits` gives every image to its own document.

# %%
from vlm_course.worlds.scenes import render

images = render(drawn[1::2], generator=torch.Generator().manual_seed(6))            # [8, 3, 96, 96]
packed = pack(documents, 600, pad_id=tok.pad_id, image_id=tok.image_id, visual_tokens=M)
with torch.no_grad():
    seen = small.model.encode_images(images)                                       # [8, M, D]
    together = packed_logits(small.model, packed, seen)                            # [B, 600, V]
    alone = [small.model(torch.tensor([d]), image_features=seen[[i // 2]] if i % 2 else None)[0]
             for i, (d, _) in enumerate(documents)]                                # 16 x [T, V]
apart = max((together[packed.documents == i] - logits).abs().max().item() for i, logits in enumerate(alone))
print(f"{len(packed.ids)} rows, {packed.filled:.0%} filled; largest difference from the documents alone: {apart:.1e}")

# %% [markdown]
# The same, but for rounding. Now with a plain causal mask, as in trainers that only concatenate: every document but the first of a row also sees its neighbours, their images and their answers.

# %%
from vlm_course.attention import causal_mask

with torch.no_grad():
    leaky = packed_logits(small.model, packed, seen, mask=causal_mask(600)[None, None])
later = (packed.documents % 2 == 1) & (packed.documents != packed.documents[:, :1])
labels_later = torch.where(later, packed.labels, IGNORE)
print(f"loss where an image is, all but the first of a row: apart {response_loss(together, labels_later):.3f}, "
      f"with a plain causal mask {response_loss(leaky, labels_later):.3f}")

# %% [markdown]
# And the positions? Rotary positions only measure distances, so behind a block mask it makes no difference where a document starts counting. With learned positions, or near the end of the trained length, it does. Restarting is right for both.

# %%
from dataclasses import replace

running = replace(packed, positions=torch.arange(600).expand(len(packed.ids), -1))
with torch.no_grad():
    shifted = packed_logits(small.model, running, seen)
real = packed.documents >= 0
print(f"positions that run on: largest difference {(shifted - together)[real].abs().max().item():.1e}")

# %% [markdown] covers=["4-simulation-1"]
# ## Every kind of instruction
#
# Click through the kinds, the scenes, and what the model looks at; change the model to one of the three diets. Every answer is computed and judged. The last kind, *count by size*, was in nobody's training.

# %% covers=["4-simulation-1"]
from vlm_course.simulations.instruction_diversity import diversity_simulation

simulation = diversity_simulation(trio, scene=scene, kind="box")
simulation.first_frame()

# %% tags=["nbval-ignore-output"] covers=["4-simulation-1"]
simulation

# %% [markdown] covers=["4-simulation-1"]
# ## Where it fails
#
# Instruction data teach the form of an answer along with its content. Where the picture gives no content, the form is left. Try the black image above. The shipped model does not fall silent; it may write anything, since no training image was black. An empty ground, which looks like its world, gets answers of the right form and the wrong content. "Without the image" is not one condition.

# %% covers=["4-simulation-1"]
for image in ("this image", "another scene's image", "an empty ground", "a black image"):
    replies = [trio.reply("shipped", s, kind, image) for s in range(5) for kind in ("colour", "existence")]
    print(f"{image:22s} right {sum(r.right for r in replies) / len(replies):.2f}   e.g. {replies[0].says[:40]}")

# %% [markdown] covers=["4-check-1"]
# ## Check question
#
# Choose on the buttons to read the reason for each option, then return your letter below: that is the answer that counts.

# %% covers=["4-check-1"]
question("q_4_1")

# %% exercise="q_4_1"
def q_4_1() -> str:
    """Return the letter of your answer."""
    ### BEGIN SOLUTION
    return "b"
    ### END SOLUTION

# %% check="q_4_1" points=1 covers=["4-check-1"]
check("q_4_1", globals())

# %% [markdown]
# ## Claims of the chapter
#
# What the source lesson says, in our words, what is true, and the section of this chapter that shows it.

# %%
from vlm_course.claims import claim_table

claim_table(4)

# %% [markdown]
# ## What you built, and where it lives
#
# - `vicuna_prompt`, `response_labels`: `vlm_course/chat.py`. LLaVA's `conversation.py` and `preprocess_v1` in its `train.py`.
# - `instruction_loss`, `response_loss`: `vlm_course/loss.py`. transformers' `ForCausalLMLoss`.
# - `pack_row`: `vlm_course/packed.py`. transformers' `DataCollatorWithFlattening`.
# - the three diets: `vlm_course/studies/instruction_mix.py`; `vlm-course study instruction-mix` trains them.

# %% [markdown]
# **To read next**
#
# - Liu et al. 2023, *Visual Instruction Tuning* (arXiv 2304.08485), section 3: how the data was made.
# - Liu et al. 2023, *Improved Baselines with Visual Instruction Tuning* (arXiv 2310.03744), section 3: short answers, and a sentence in the prompt that asks for them.
# - `docs/Data.md` and `playground/data/prompts` of haotian-liu/LLaVA: the files and what GPT-4 was told.

# %% [markdown]
# All parts are on the table. Chapter 5 assembles them: your classes, the shipped weights, and a model that answers.
