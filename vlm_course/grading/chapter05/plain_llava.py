"""Exercise: the whole model, from ids and pixels to logits."""

import torch
from torch import nn

from vlm_course.attention import causal_mask, padding_mask
from vlm_course.bridges import VisionProjection
from vlm_course.decoder import Decoder
from vlm_course.fusion import splice_image_features
from vlm_course.grading.answers import Failure
from vlm_course.grading.chapter05.tiny import PATCHES, pictures, prompt, read_alone, tiny_llava
from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake
from vlm_course.vit import VisionTransformer

PARTS = ("vision", "bridge", "decoder")
NO_EMBED = "Your model has no embed(ids, pixels) yet: decoding with a cache reads the prompt through it."


def drive(answer, seed, feature_layer, ids, pixels, real):
    """Builds the learner's model, loads weights, and returns the logits of all real tokens: [n, V]."""
    reference = tiny_llava(seed, feature_layer)
    model = answer(reference.config)
    if not isinstance(model, nn.Module):
        raise TypeError(f"PlainLlava(config) should make an nn.Module, it made a {type(model).__name__}")
    wanted, found = ({k: v.shape for k, v in m.state_dict().items()} for m in (reference, model))
    if wanted != found:
        has = ", ".join(name for name, _ in model.named_children()) or "none"
        missing = next((k for k in wanted if found.get(k) != wanted[k]), next(iter(found.keys() - wanted.keys()), ""))
        if missing in wanted and missing in found:
            expected, got = (tuple(shapes[missing]) for shapes in (wanted, found))
            raise ValueError(f"{missing} has the shape {got}, the trained one {expected}: two widths may be exchanged")
        raise ValueError(
            f"the trained weights do not fit: the model needs the parts {', '.join(PARTS)} and has {has}; "
            f"the first that does not fit is {missing}"
        )
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        logits = model(ids, pixels) if bool(real.all()) else model(ids, pixels, real)
        try:
            model.embed(ids, pixels)
        except (AttributeError, NotImplementedError):
            raise Failure("error", NO_EMBED) from None
    if not isinstance(logits, torch.Tensor) or logits.shape[:2] != ids.shape:
        return logits
    return logits[real]


def oracle(seed, feature_layer, ids, pixels, real):
    """Every row alone, without its padding, so that no mask is needed."""
    model, images, rows = tiny_llava(seed, feature_layer), iter(pixels), []
    for row, kept in zip(ids, real, strict=True):
        own = row[kept].tolist()
        count = own.count(model.config.image_id) // PATCHES
        rows.append(read_alone(model, own, torch.stack([next(images) for _ in range(count)])))
    return torch.cat(rows)


def cases(seed: int) -> list[Case]:
    def case(number: int, feature_layer: int, rows: list[list[int]], images: int) -> Case:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        real = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
        names = ("seed", "feature_layer", "ids", "pixels", "attention_mask")
        return Case(dict(zip(names, (number, feature_layer, ids, pictures(number, images), real), strict=True)))

    one, two, three = 10 * seed, 10 * seed + 1, 10 * seed + 2
    return [
        case(one, -2, [prompt(one, text=(2, 4))], 1),
        # Two rows of one length with an image each, then rows of different length: one of them with two images.
        case(two, -3, [prompt(two, text=(3, 2)), prompt(two + 50, text=(3, 2))], 2),
        case(three, -2, [prompt(three, text=(1, 2)), prompt(three + 50, text=(2, 3), images=2)], 3),
    ]


class Variant(nn.Module):
    """A right model whose steps can be exchanged one by one."""

    def __init__(self, config, *, features=None, merge=None, mask=None, finish=None):
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.bridge = VisionProjection(config.vision.width, config.text.width)
        self.decoder = Decoder(config.text)
        self.steps = features or patches, merge or splice, mask or both_masks, finish or (lambda logits: logits)

    def embed(self, ids, pixels):
        features, merge, *_ = self.steps
        return merge(self, ids, self.decoder.embed(ids), self.bridge(features(self, pixels)))

    def forward(self, ids, pixels, attention_mask=None):
        *_, mask, finish = self.steps
        embeds = self.embed(ids, pixels)
        if attention_mask is None:
            attention_mask = torch.ones_like(ids, dtype=torch.bool)
        return finish(self.decoder(embeds, mask=mask(attention_mask)))


def patches(model, pixels):
    return model.vision.patch_features(pixels, layer=model.config.feature_layer)


def splice(model, ids, words, visual):
    return splice_image_features(words, ids, visual, model.config.image_id)


def both_masks(real):
    return padding_mask(real) & causal_mask(real.shape[1])


def made(**steps):
    """An answer that differs from the right one in the given steps."""
    return lambda config: Variant(config, **steps)


def in_front(model, ids, words, visual):
    """All visual tokens of a row at its start, then its words."""
    rows, start = [], 0
    for row, word in zip(ids, words, strict=True):
        is_image = row == model.config.image_id
        count = int(is_image.sum()) // PATCHES
        rows.append(torch.cat([*visual[start : start + count], word[~is_image]]))
        start += count
    return torch.stack(rows)


def added(model, ids, words, visual):
    return words + (splice(model, ids, words, visual) - words) + words * (ids == model.config.image_id)[..., None]


def repeated(model, ids, words, visual):
    return splice(model, ids, words, visual[:1].expand_as(visual))


def reversed_patches(model, ids, words, visual):
    return splice(model, ids, words, visual.flip(1))


def own_features(layer):
    return lambda model, pixels: model.vision.patch_features(pixels, layer=layer)


def with_class_token(model, pixels):
    return model.vision.hidden_states(pixels)[model.config.feature_layer][:, :-1]


def normalised(model, pixels):
    return model.vision.post_norm(patches(model, pixels))


class Renamed(Variant):
    """The parts under other names: the trained weights do not fit."""

    def __init__(self, config):
        super().__init__(config)
        self.projector = self.bridge
        del self.bridge


class WithoutEmbed(nn.Module):
    """The right logits by forward alone."""

    def __init__(self, config):
        super().__init__()
        whole = Variant(config)
        self.vision, self.bridge, self.decoder = whole.vision, whole.bridge, whole.decoder
        self.whole = [whole]  # in a list, so that its parts do not count twice

    def forward(self, ids, pixels, attention_mask=None):
        return self.whole[0](ids, pixels, attention_mask)


class RowByRow(Variant):
    """Every row alone and without its padding; the logits of padding stay zero."""

    def forward(self, ids, pixels, attention_mask=None):
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        out, start = torch.zeros(*ids.shape, self.config.text.vocab_size), 0
        for row, kept in enumerate(real):
            own = ids[row, kept]
            count = int((own == self.config.image_id).sum()) // self.config.visual_tokens
            visual = self.bridge(patches(self, pixels[start : start + count]))
            embeds = self.decoder.embed(own[None])[0]  # [1, n] -> [n, D]
            embeds[own == self.config.image_id] = visual.flatten(0, 1)
            out[row, kept] = self.decoder(embeds[None])[0]
            start += count
        return out


class Scattered(Variant):
    """All hidden states, a scatter, and a mask written down by hand."""

    def forward(self, ids, pixels, attention_mask=None):
        features = self.bridge(self.vision.hidden_states(pixels)[self.config.feature_layer][:, 1:])
        place = (ids == self.config.image_id).unsqueeze(-1).expand(-1, -1, features.shape[-1])
        embeds = self.decoder.token_embedding(ids).masked_scatter(place, features)
        length = ids.shape[1]
        mask = torch.ones(length, length).tril().bool().expand(len(ids), 1, length, length)
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, :]
        return self.decoder(embeds, mask=mask)


PLAIN_LLAVA = Exercise(
    name="plain_llava",
    chapter="05",
    title="Build It: the whole model",
    difficulty="medium",
    minutes=25,
    points=5,
    attribute="PlainLlava",
    twin="vlm_course.plain:PlainLlava",
    forbidden=("vlm_course.llava:Llava",),
    interface=FunctionInterface(
        {
            "seed": "integer, for the weights",
            "feature_layer": "integer",
            "ids": "tensor [B, T]",
            "pixels": "tensor [images, 3, H, W]",
            "attention_mask": "tensor [B, T], True for real tokens",
        },
        "tensor [n, V], the logits of all real tokens",
        driver="vlm_course.grading.chapter05.plain_llava:drive",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "padding mask alone": Mistake(
            "Your padding mask replaces the causal mask, so tokens see the future: combine the two with &.",
            made(mask=padding_mask),
        ),
        "no padding mask": Mistake(
            "Your tokens attend to the padding in front of them: padding_mask hides it.",
            made(mask=lambda real: causal_mask(real.shape[1])[None, None]),
        ),
        "masks joined by or": Mistake(
            "You join the masks with |: a token may attend where both masks allow it, so it is &.",
            made(mask=lambda real: padding_mask(real) | causal_mask(real.shape[1])),
        ),
        "causal mask transposed": Mistake(
            "Your causal mask is transposed: each token sees the future and not the past.",
            made(mask=lambda real: padding_mask(real) & causal_mask(real.shape[1]).T),
        ),
        "padding rows, not columns": Mistake(
            "You hide padded queries: what must be hidden are padded keys, the last dimension of the mask.",
            made(mask=lambda real: real.bool()[:, None, :, None] & causal_mask(real.shape[1])),
        ),
        "the last layer": Mistake(
            "You read the vision tower's last layer: take the one that config.feature_layer names.",
            made(features=own_features(-1)),
        ),
        "always -2": Mistake(
            "You always read layer -2: take config.feature_layer, another checkpoint may differ.",
            made(features=own_features(-2)),
        ),
        "class token kept": Mistake(
            "You drop the last patch instead of the class token, which is the first: cut with [:, 1:].",
            made(features=with_class_token),
        ),
        "normalised features": Mistake(
            "You apply the tower's final LayerNorm: the bridge reads the layer as it is.", made(features=normalised)
        ),
        "image in front": Mistake(
            "You put the image in front of all words: its place is where the placeholders stand.", made(merge=in_front)
        ),
        "added to the placeholder": Mistake(
            "You add the features to the placeholders' embeddings: they take their place.", made(merge=added)
        ),
        "not spliced": Mistake(
            "The image never arrives: the placeholders keep their word embedding.",
            made(merge=lambda model, ids, words, visual: words),
        ),
        "first image for all": Mistake(
            "Every placeholder gets the first image: images go to the placeholders in order, row after row.",
            made(merge=repeated),
        ),
        "patches reversed": Mistake(
            "Your patches arrive in reverse order: keep the tower's.", made(merge=reversed_patches)
        ),
        "probabilities": Mistake(
            "You return probabilities: forward returns the logits, before any softmax.",
            made(finish=lambda logits: logits.softmax(-1)),
        ),
        "last position only": Mistake(
            "You return the last position only: training needs the logits of every position.",
            made(finish=lambda logits: logits[:, -1]),
        ),
        "other names": Mistake(
            "The trained weights do not fit: call the three parts vision, bridge and decoder.", Renamed
        ),
        "no embed": Mistake(NO_EMBED, WithoutEmbed),
    },
    also_correct={"row by row": RowByRow, "scatter and a mask by hand": Scattered},
)
