"""Four ways to bring an image into a language model, trained alike: who looks at whom, and how well it works.

`early`: a visual token for every patch, spliced into the sequence (LLaVA). `resampler`: the same with 16 learned
queries in place of 144 patches (Qwen-VL's idea). `interleaved`: two images, each followed by questions about it, in one
sequence. `cross-attention`: the sequence holds text alone, and gated cross-attention reads the patches (Flamingo's idea
without its resampler, as in Llama 3.2 Vision). All behind the shipped vision tower, which stays frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bridges import PerceiverResampler
from ..flamingo import CrossAttentionDecoder
from ..llava import Llava
from ..loss import response_loss
from ..pretrained import Small
from ..probe_questions import QuestionSet, Score, question_set
from ..worlds.dialogs import KINDS
from ..worlds.templates import compact
from .common import Lab, Measures, Phases, Study, seeing_logits
from .results import Results, load_weights
from .tiny import learned, tiny_config, tiny_llava

STRATEGIES = ("early", "cross-attention", "resampler", "interleaved")
QUERIES = 16
STEPS, BATCH, LR, TURNS, LENGTH = 1200, 256, 2e-3, 12, 176
MIX = {"existence": 3.0, "colour": 1.5, "shape": 1.5, "count": 0.5, "caption": 1.5}  # captions: many words an image
EXAM = ("colour", "shape", "existence")


class ResamplerBridge(nn.Module):
    """`QUERIES` learned queries read the patches, then one linear map. forward: [B, N, D_vision] -> [B, M, D_llm]."""

    def __init__(self, vision_dim: int, llm_dim: int, queries: int = QUERIES):
        super().__init__()
        self.resampler = PerceiverResampler(dim=vision_dim, queries=queries, depth=1, heads=6, head_dim=32, mlp_ratio=2)
        self.linear = nn.Linear(vision_dim, llm_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.resampler(features))


def build(strategy: str, small: Small, *, seed: int = 0) -> nn.Module:
    """The untrained model of a strategy, a `Llava` or a `CrossAttentionDecoder`. ValueError for another name."""
    if strategy not in STRATEGIES:
        raise ValueError(f"the strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if strategy in ("early", "interleaved"):
        return tiny_llava(small, seed=seed)
    vision, text = small.model.config.vision.width, tiny_config(small).text
    device = next(small.model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if strategy == "cross-attention":
            options = {"image_id": small.tokenizer.image_id, "media_dim": vision, "at": (1, 2), "heads": 4}
            return CrossAttentionDecoder(text, **options, head_dim=32).to(device)
        bridge = ResamplerBridge(vision, text.width)
    return tiny_llava(small, seed=seed, bridge=bridge)


def placeholders(strategy: str, small: Small) -> int:
    """How many <image> tokens one image takes in the sequence of the language model."""
    return {"cross-attention": 1, "resampler": QUERIES}.get(strategy, small.model.config.visual_tokens)


def logits(model: nn.Module, ids: Tensor, patches: Tensor, keep: int = 0, phases: Phases | None = None) -> Tensor:
    """ids [B, T] and the tower's features [n_images, N, D_vision], row after row -> [B, T, V], or the last `keep`."""
    if isinstance(model, Llava):
        return seeing_logits(model, ids, patches, keep, phases)
    media = model.read(patches.unflatten(0, (len(ids), -1)))  # [B, n_images, M, D]
    return model(ids, media, logits_to_keep=keep)


def loss(
    model: nn.Module, ids: Tensor, labels: Tensor, patches: Tensor, text: int, phases: Phases | None = None
) -> Tensor:
    """The mean loss of the answers among the last `text` tokens; `phases` as in `Lab.phases`, for a `Llava`."""
    return response_loss(logits(model, ids, patches, text, phases), labels[:, -text:])


def in_one_row(ids: Tensor, labels: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Conversations 0 and 1 in one row, then 2 and 3: [2B, T] -> [B, 2T], <pad> at the end, every <bos> kept."""
    ids, labels = (value.unflatten(0, (-1, 2)).flatten(1) for value in (ids, labels))  # [2B, T] -> [B, 2T]
    return compact(ids, labels, pad_id=pad_id)


def mix_of_questions() -> Tensor:
    """How often each kind of question is asked: [kinds]."""
    return torch.tensor([MIX.get(name, 0.0) for name in KINDS])


def learn(strategy: str, lab: Lab) -> nn.Module:
    """Train one strategy from nothing: twelve turns about an image, or six about each of two."""
    model, tok, mix = build(strategy, lab.small, seed=lab.seed), lab.small.tokenizer, mix_of_questions()
    visual, images = placeholders(strategy, lab.small), 1 + (strategy == "interleaved")
    total = images * (1 + visual) + LENGTH

    def loss_at(step: int, batch: int) -> Tensor:
        scenes, generator = lab.scenes_at(0, step, batch)
        talk = lab.dialogs.several(scenes, TURNS // images, mix, generator=generator)
        ids, labels = lab.dialogs.conversation(talk, visual_tokens=visual)
        if images == 2:
            ids, labels = in_one_row(ids, labels, tok.pad_id)
        wider = max(0, total - ids.shape[1])
        ids = nn.functional.pad(ids, (0, wider), value=tok.pad_id)[:, :total]
        labels = nn.functional.pad(labels, (0, wider), value=-100)[:, :total]
        # Of two images the second stands in the middle, so everything after the first may hold answers.
        patches = lab.features(lab.images(scenes, generator))
        phases = lab.phases(model, total) if isinstance(model, Llava) else None
        return lab.compiled(loss)(model, ids, labels, patches, total - 1 - visual, phases)

    trains = ("bridge.", "decoder.") if isinstance(model, Llava) else ("decoder.", "cross.")
    lab.fit(model, loss_at, name=f"fusion-{strategy}", steps=STEPS, lr=LR, trains=trains, batch=BATCH)
    return model


def train(variant: str, lab: Lab) -> tuple[Measures, dict[str, Tensor]]:
    """One run: training, then the exam."""
    model = learn(variant, lab)
    return {"exam": exam(variant, model, lab.small, lab.tests)}, learned(model)


def exam_questions(strategy: str, small: Small, scenes: int, seed: int = 7) -> QuestionSet:
    """Three questions about each of a number of fresh scenes, with as many placeholders as the strategy needs."""
    visual = placeholders(strategy, small)
    return question_set(small.tokenizer, scenes=scenes, kinds=EXAM, visual_tokens=visual, seed=seed, objects=(2, 5))


@torch.no_grad()
def exam(strategy: str, model: nn.Module, small: Small, scenes: int) -> Measures:
    """Share of exact answers by kind, beside the answers about the next scene's image.

    With `interleaved` the scene asked about is the second of two in its row.
    """
    device = next(model.parameters()).device
    questions = exam_questions(strategy, small, scenes)
    tower, layer = small.model.vision, small.model.config.feature_layer
    patches = torch.cat([tower.patch_features(p.to(device), layer=layer) for p in questions.pixels.split(100)])
    found: Measures = {"majority": {kind: questions.majority(kind) for kind in EXAM}}
    for name, seen in (("model", patches), ("swapped", patches.roll(1, 0))):
        score = answers(strategy, model, questions, seen)
        found[name] = {kind: score.accuracy(kind) for kind in EXAM}
    return found


@torch.no_grad()
def answers(strategy: str, model: nn.Module, questions: QuestionSet, patches: Tensor, batch: int = 100) -> Score:
    """What the model answers when the questions' images are `patches` [B, N, D_vision].

    With `interleaved` another image and its three questions stand before.
    """
    pad, n, length = questions.tokenizer.pad_id, len(patches), questions.ids.shape[1]
    best, total = [], 0.0
    for rows in torch.arange(n).split(batch):
        ids, labels, seen = questions.ids[rows], questions.labels[rows], patches[rows]
        if strategy == "interleaved":
            other = (rows + 2) % n
            ids = torch.cat([questions.ids[other], ids], 1)
            labels = torch.cat([torch.full_like(labels, -100), labels], 1)
            seen = torch.stack([patches[other], seen], 1).flatten(0, 1)  # 2 x [b, N, D] -> [2b, N, D]
        order = (ids == pad).long().argsort(dim=1, stable=True)  # <pad> to the end
        out = logits(model, ids.gather(1, order).to(patches.device), seen).float().cpu()
        total += response_loss(out, labels.gather(1, order)).item() * len(rows)
        word = out.argmax(-1).roll(1, dims=1)
        best.append(torch.empty_like(ids).scatter(1, order, word)[:, -length:])  # back to the questions' own places
    return Score(questions, total / n, torch.where(questions.turn >= 0, torch.cat(best), -1))


def load(results: Results, strategy: str, small: Small) -> nn.Module:
    """The shipped model of a strategy, in float32 and eval mode, behind the given model's vision tower."""
    model = build(strategy, small)
    path = results.folder / f"{results.record['study']}-{strategy}.safetensors"
    weights = load_weights(path)
    vision = {name: value for name, value in model.state_dict().items() if name.startswith("vision.")}
    model.load_state_dict(weights | vision)
    return model.eval().requires_grad_(False)


STUDY = Study(
    name="fusion",
    question="Where does an image enter the language model, who looks at whom, and how well does it answer?",
    variants={
        "early": "a visual token for every patch, spliced into the sequence",
        "cross-attention": "text alone in the sequence; gated cross-attention before two blocks of four reads patches",
        "resampler": f"{QUERIES} learned queries read the patches; their {QUERIES} tokens are spliced in",
        "interleaved": "two images in one sequence, each followed by questions about it",
    },
    train=train,
    ships={"early": 2, "cross-attention": 1},  # whose seed 0 had not learned colours, or existence, yet
)
