"""Chapter 9, and the measurements: packing, merging, video, actions, budgets, Emu."""

import torch
from bad_input_table import NO_ROW, Bool, F, I, row

from vlm_course import packing
from vlm_course.actions import ActionTokenizer
from vlm_course.causal_former import CausalFormer, CausalFormerLayer, T5Attention
from vlm_course.decoder import DecoderConfig
from vlm_course.emu import Emu
from vlm_course.llava import Llava, LlavaConfig
from vlm_course.merging import Matching, bipartite_soft_matching
from vlm_course.tokenizer import WordTokenizer
from vlm_course.video import TemporalPerceiver, TubeletEmbedding
from vlm_course.vit import VisionTransformer, ViTConfig

NAN = float("nan")
PICTURES = [torch.rand(3, 4, 6), torch.rand(3, 2, 2)]  # 6 + 1 patches of 2 x 2
PACKED = packing.pack_images(PICTURES, 2)
PACKED_VIT = packing.PackedViTConfig(patch_size=2, width=8, layers=1, heads=2, mlp_width=4)

NO_ROW["packing.PackedImages"] = "what pack_images gives back"
row(
    "packing.first_fit",
    lengths=[2, 3],
    capacity=4,
    _bad=[
        ({"lengths": []}, "0 lengths", "at least 1"),
        ({"lengths": [5]}, "5", "4"),
        ({"lengths": [0]}, "0", "1 to 4"),
    ],
)
row("packing.grid_positions", rows=2, columns=3)
row("packing.pack_images", images=PICTURES, patch_size=2,
    _bad=[({"images": []}, "0 images", "at least 1"), ({"images": [torch.zeros(1, 3, 4, 4)]}, "4 dimensions", "3"),
          ({"images": [torch.zeros(3, 5, 4)]}, "5", "2"), ({"images": [*PICTURES, torch.zeros(1, 2, 2)]}, "1", "3"),
          ({"images": [torch.zeros(3, 0, 2)]}, "0", "at least 1"), ({"capacity": 5}, "6", "5"),
          ({"rows": [[0], [0]]}, "[[0], [0]]", "0 to 1"),
          ({"images": [PICTURES[0], PICTURES[1].to("meta")]}, "meta", "cpu")])  # fmt: skip
row("packing.unpack_images", features=F("1 7 D"), packed=PACKED)
row("packing.axial_phases", positions=I("B L 2"), head_dim=8, theta=100.0, _bad=[({"head_dim": 6}, "6", "4")])
row("packing.stretched_positions", table=F("r c D"), packed=PACKED)
row("packing.FactorisedPositions", max_rows=3, max_columns=4, width=5)
row("packing.FactorisedPositions.forward", _on=lambda s: packing.FactorisedPositions(3, 4, 5), positions=I("B L 2"),
    _bad=[({"positions": torch.tensor([[[3, 0]]])}, "3", "3 rows"),
          ({"positions": torch.tensor([[[0, -1]]])}, "-1", "4 columns")])  # fmt: skip
row("packing.PackedViTConfig", patch_size=2, width=8, layers=1, heads=2, mlp_width=4, _bad=[({"width": 12}, "12", "8")])
row("packing.PackedVisionTransformer", config=PACKED_VIT, _bad=[({"config": {}}, "dict", "PackedViTConfig")])
row("packing.PackedVisionTransformer.forward", _on=lambda s: packing.PackedVisionTransformer(PACKED_VIT), packed=PACKED,
    _bad=[({"packed": packing.pack_images(PICTURES[1:], 1)}, "3", "12"),
          ({"packed": packing.pack_images([PICTURES[0].to("meta")], 2)}, "meta", "cpu")])  # fmt: skip

MATCHING = bipartite_soft_matching(torch.rand(3, 6, 4), 2)
VIT = ViTConfig(image_size=(4, 6), patch_size=2, width=8, layers=2, heads=2, mlp_width=6)
SIX = {"_fix": {"B": 3, "N": 6}}
NOT_POSITIVE = ({"sizes": torch.zeros(3, 6)}, "not above 0", "(3, 6)")
row(
    "merging.Matching",
    assignment=I("B N"),
    tokens=2,
    _free={
        "assignment.rank": "only its own functions make one",
        "assignment.B=0": "only its own functions make one",
        "assignment.N=0": "only its own functions make one",
    },
)
row(
    "merging.Matching.then",
    _on=lambda s: MATCHING,
    later=Matching(torch.zeros(3, 4).long(), 1),
    _bad=[({"later": MATCHING}, "6", "4")],
)
row(
    "merging.bipartite_soft_matching",
    metric=F("B N D"),
    r=1,
    _least={"r": 0, "protected": 0},
    _bad=[({"protected": 9}, "9", "4 tokens"), ({"metric": torch.full((1, 2, 3), NAN)}, "6 of 6", "NaN")],
)
row(
    "merging.merge_tokens",
    x=F("B N D"),
    sizes=F("B N", lambda s: torch.ones(3, 6)),
    matching=MATCHING,
    **SIX,
    _bad=[NOT_POSITIVE, ({"matching": Matching(MATCHING.assignment.to("meta"), 4)}, "cpu", "meta")],
)
row(
    "merging.unmerge_tokens",
    x=F("3 4 D"),
    matching=MATCHING,
    _bad=[({"matching": Matching(MATCHING.assignment.to("meta"), 4)}, "cpu", "meta")],
)
row(
    "merging.proportional_attention",
    q=F("B H T d"),
    k=F("B H S d"),
    v=F("B H S e"),
    sizes=F("B S", lambda s: torch.ones(s.B, s.S)),
    _fix={"B": 3, "S": 6},
    _bad=[NOT_POSITIVE],
)
row(
    "merging.token_counts",
    tokens=9,
    r=2,
    layers=3,
    _least={"r": 0, "protected": 0},
    _bad=[({"protected": 10}, "10", "9")],
)
row(
    "merging.merged_forward",
    tower=lambda s: VisionTransformer(VIT),
    pixels=F("B C 4 6"),
    r=1,
    _fix={"C": 3},
    _least={"r": 0},
    _bad=[({"pixels": torch.zeros(1, 3, 4, 6, device="meta")}, "meta", "cpu")],
)

row("video.sample_frames", total=9, frames=3, _bad=[({"frames": 10}, "10", "9")])
row(
    "video.sample_by_rate",
    total=90,
    video_fps=30.0,
    fps=1.0,
    _bad=[({"min_frames": 800}, "800", "768"), ({"multiple": 800}, "800", "768"), ({"total": 1}, "1", "2")],
)
row("video.group_frames", frames=F("f N"), _free={"frames.rank": "what a frame holds may have any shape"})
row("video.merge_frames", features=F("f N D"))
row("video.TubeletEmbedding", channels=1, patch_size=2, width=3)
row(
    "video.TubeletEmbedding.forward",
    _on=lambda s: TubeletEmbedding(channels=1, patch_size=2, width=3),
    frames=F("f C 2r 2c"),
    _fix={"C": 1},
)
GRIDS = [({"grid": (2, 0)}, "(2, 0)", "at least 1"), ({"grid": (2, 3, 1)}, "(2, 3, 1)", "two")]
row(
    "video.pool_frames",
    features=F("f 6 D"),
    grid=(2, 3),
    _bad=[*GRIDS, ({"stride": 3}, "3", "2"), ({"mode": "mean"}, "mean", "average")],
)
row("video.video_tokens", frames=3, grid=(2, 3), _bad=GRIDS)
CLIP = {"dim": 4, "queries": 2, "max_frames": 5, "heads": 2}
row("video.TemporalPerceiver", **CLIP)
row(
    "video.TemporalPerceiver.forward",
    _on=lambda s: TemporalPerceiver(**CLIP),
    features=F("B f N D"),
    _fix={"D": 4},
    _bad=[({"features": torch.zeros(1, 6, 1, 4)}, "6 frames", "5")],
)
row("video.mrope_positions", types=I("B T"), attention_mask=Bool("B T"),
    _bad=[({"types": torch.full((3, 2), 3)}, "3", "0 (text)"), ({"images": [(1, 2, 2)]}, "0 image tokens", "1"),
          ({"images": [(2, 4)]}, "(2, 4)", "frames, rows"), ({"images": [(1, 3, 4)]}, "3", "2"),
          ({"after": "end"}, "end", "maximum"), ({"attention_mask": torch.zeros(3, 2)}, "0 real tokens", "1")],
    _fix={"B": 3, "T": 2})  # fmt: skip
row(
    "video.mrope_phases",
    positions=I("3 B T"),
    head_dim=8,
    sections=(1, 1, 2),
    theta=100.0,
    _bad=[({"sections": (1, 1, 1)}, "3", "8"), ({"sections": (2, 2)}, "(2, 2)", "three")],
)

row(
    "actions.ActionTokenizer",
    vocab_size=300,
    _least={"bins": 2},
    _free={"low=-1": "the usual end of the range", "high=-1": "an end of the range may be any number"},
    _bad=[({"bins": 400}, "300", "400"), ({"low": 1.0}, "low is 1.0", "high is 1.0")],
)
ROBOT = {"_on": lambda s: ActionTokenizer(vocab_size=300)}
ANY_DEPTH = "actions of any number of steps and rows"
row(
    "actions.ActionTokenizer.encode",
    **ROBOT,
    actions=F("B D"),
    _free={"actions.rank": ANY_DEPTH},
    _bad=[({"actions": torch.full((1, 2), NAN)}, "2", "NaN")],
)
row(
    "actions.ActionTokenizer.decode",
    **ROBOT,
    ids=I("B D", lambda s: torch.full((s.B, s.D), 299)),
    _free={"ids.rank": ANY_DEPTH},
    _bad=[({"ids": torch.full((1, 2), 300)}, "300", "44 to 299"), ({"ids": torch.full((1, 2), 43)}, "43", "44 to 299")],
)
RANGE = {
    "actions": F("B D"), "q01": F("D", lambda s: torch.zeros(s.D)), "q99": F("D", lambda s: torch.ones(s.D)),
    "mask": Bool("D"), "_free": {"actions.rank": ANY_DEPTH},
    "_bad": [({"actions": torch.full((1, 2), NAN)}, "2", "NaN"), ({"q01": torch.full((2,), 2.0)}, "2.0", "1.0"),
             ({"q99": torch.full((2,), NAN)}, "2", "NaN")],
    "_fix": {"D": 2},
}  # fmt: skip
row("actions.normalize_actions", **RANGE)
row("actions.unnormalize_actions", **RANGE)

TEXT = DecoderConfig(vocab_size=60, width=8, layers=1, heads=2, kv_heads=1, mlp_width=6, max_positions=40)
LLAVA = LlavaConfig(vision=VIT, text=TEXT, image_id=3)
NO_MODEL = ({"config": "LLaVA"}, "str", "DecoderConfig")
UNKNOWN = ({"gpu": "A1000"}, "A1000", "A100-80GB")
ODD_BITS = ({"quantization": "int3"}, "int3", "int4")
PART = ({"efficiency": 1.5}, "1.5", "1")
row("budget.GPU", name="x", memory=1e9, bandwidth=1e9, flops=1e12, source="y")
row("budget.Quantization", name="x", bits=4.0, group=128, group_bits=20, _least={"group_bits": 0})
row("budget.decoder_parameters", text=TEXT, _bad=[({"text": "LLaVA"}, "str", "DecoderConfig")])
row("budget.vit_parameters", vision=VIT, _bad=[({"vision": "CLIP"}, "str", "ViTConfig")])
row("budget.parameters", config=TEXT, _bad=[NO_MODEL])
row("budget.weight_bytes", config=TEXT, _bad=[NO_MODEL, ODD_BITS])
row("budget.kv_cache_bytes", config=TEXT, tokens=5, _least={"tokens": 0}, _bad=[NO_MODEL])
row("budget.activation_bytes", config=TEXT, tokens=5, _bad=[NO_MODEL])
row("budget.vit_flops", vision=VIT, _least={"layers": 0}, _bad=[({"layers": 3}, "3", "2"), ({"vision": 1}, "int")])
row("budget.decoder_flops", text=TEXT, tokens=5, _least={"past": 0, "logits": 0})
row(
    "budget.prefill_flops",
    config=LLAVA,
    tokens=5,
    images=1,
    _least={"images": 0},
    _bad=[NO_MODEL, ({"config": TEXT}, "1 images", "DecoderConfig")],
)
row(
    "budget.prefill_seconds",
    config=LLAVA,
    gpu="T4",
    tokens=5,
    _least={"images": 0},
    _bad=[NO_MODEL, UNKNOWN, ODD_BITS, PART],
)
row(
    "budget.decode_seconds",
    config=LLAVA,
    gpu="T4",
    context=5,
    new_tokens=2,
    _least={"context": 0, "new_tokens": 0},
    _bad=[NO_MODEL, UNKNOWN, ODD_BITS, PART],
)
NO_ROW["budget.Budget"] = "what budget gives back"
row(
    "budget.budget",
    config=LLAVA,
    gpu="T4",
    text_tokens=5,
    new_tokens=2,
    _least={"text_tokens": 0, "new_tokens": 0, "images": 0},
    _bad=[NO_MODEL, UNKNOWN, ODD_BITS, PART],
)

TOKENIZER = WordTokenizer.small()
WORDS = LlavaConfig(
    vision=VIT, image_id=TOKENIZER.image_id,
    text=DecoderConfig(vocab_size=TOKENIZER.vocab_size, width=8, layers=1, heads=2, kv_heads=1, mlp_width=6),
)  # fmt: skip


def small(s=None):
    return Llava(WORDS)


def question(s):
    return torch.full((s.B, s.L), 9)


row(
    "measures.encode_in_batches",
    model=small,
    pixels=F("B C 4 6"),
    batch=2,
    _fix={"C": 3},
    _bad=[({"pixels": torch.zeros(1, 3, 4, 6, device="meta")}, "meta", "cpu")],
)
row(
    "measures.answer",
    model=small,
    tokenizer=TOKENIZER,
    features=F("B N D"),
    questions=I("B L", question),
    max_new_tokens=2,
    _fix={"D": 8},
    _low={"B": 2},
)
row(
    "measures.answer_many",
    model=small,
    tokenizer=TOKENIZER,
    features=F("B N D"),
    image=I("Q"),
    questions=I("Q L", lambda s: torch.full((s.Q, s.L), 9)),
    max_new_tokens=2,
    _fix={"D": 8, "Q": 3},
    _bad=[({"image": torch.full((3,), 9)}, "9", "images"), ({"image": torch.full((3,), -1)}, "-1", "images")],
)
SILENT = "a model may answer with nothing, which holds no numbers"
NONE = "no answers overlap nothing: a mean over them is the caller's"
row("measures.box_iou", a=F("B 4"), b=F("B 4"), _low={"B": 2}, _free={"a.B=0": NONE, "b.B=0": NONE})
row(
    "measures.read_numbers",
    answers=I("B L"),
    tokenizer=TOKENIZER,
    count=4,
    marks="[]",
    _free={"answers.B=0": SILENT, "answers.L=0": SILENT},
    _bad=[({"marks": "["}, "'['", "two")],
)
row("measures.format_table", table={"a": {"b": 1.0}}, _bad=[({"table": {}}, "0 rows", "at least 1")])

# --- Emu

BUCKETS = [({"buckets": 3}, "3", "2"), ({"max_distance": 2}, "2", "2 distances")]
FORMER = {"vision_dim": 5, "llm_dim": 8, "queries": 2, "dim": 6, "layers": 1, "heads": 2, "mlp_width": 4}
FORMER |= {"buckets": 4, "max_distance": 6}
TEXT = DecoderConfig(vocab_size=9, width=8, layers=1, heads=2, kv_heads=1, mlp_width=6)


def emu(s):
    return Emu(bridge=CausalFormer(**FORMER), text=TEXT, image_id=7, start_id=6)


def pictured(s):
    """Rows with one image of two embeddings and a word."""
    return torch.tensor([1, 6, 7, 7, 2]).repeat(s.B, 1)


def asked(s):
    return torch.tensor([1, 6, 7, 7, 2, 6]).repeat(s.B, 1)


row("causal_former.distance_buckets", length=5, buckets=4, max_distance=6, _least={"buckets": 2, "max_distance": 2},
    _bad=BUCKETS)  # fmt: skip
row("causal_former.T5Attention", dim=6, context_dim=4, heads=2, _bad=[({"heads": 4}, "6", "4")])
row("causal_former.T5Attention.forward", _on=lambda s: T5Attention(6, 4, 2), x=F("B T D"), context=F("B S C"),
    bias=F("2 T S"), _fix={"D": 6, "C": 4}, _low={"B": 2, "T": 2, "S": 2})  # fmt: skip
row("causal_former.CausalFormerLayer", dim=6, vision_dim=4, heads=2, mlp_width=5)
row("causal_former.CausalFormerLayer.forward",
    _on=lambda s: CausalFormerLayer(dim=6, vision_dim=4, heads=2, mlp_width=5), x=F("B M D"), features=F("B N C"),
    bias=F("2 M M"), _fix={"D": 6, "C": 4}, _low={"B": 2, "M": 2})  # fmt: skip
row("causal_former.CausalFormer", **FORMER, _least={"buckets": 2, "max_distance": 2},
    _bad=[*BUCKETS, ({"heads": 4}, "6", "4")])  # fmt: skip
row("causal_former.CausalFormer.forward", _on=lambda s: CausalFormer(**FORMER), features=F("B N C"), _fix={"C": 5})
NO_ROW["emu.ElementLoss"] = "what next_element_loss gives back"
NO_ROW["emu.EmuOutput"] = "what Emu gives back"
row("emu.next_element_loss", logits=F("B T V"), regressed=F("B T D"), ids=I("B T", pictured), embeds=F("B T D"),
    image_id=7, _fix={"T": 5, "V": 9}, _low={"B": 2}, _least={"image_id": 0, "end_id": 0},
    _free={"logits.V+1": "a vocabulary may have words that no row holds"},
    _bad=[({"ids": torch.full((3, 5), 9)}, "from 9 to 9", "0 to 8"),
          ({"image_id": 5}, "0 of", "image_id 5")])  # fmt: skip
NARROW = CausalFormer(5, 4, queries=1, dim=6, layers=1, heads=2)
row("emu.Emu", bridge=CausalFormer(**FORMER), text=TEXT, image_id=7, start_id=6,
    _least={"image_id": 0, "start_id": 0},
    _bad=[({"image_id": 9}, "9", "0 to 8"), ({"start_id": 9}, "9", "0 to 8"), ({"text": None}, "NoneType", "expected"),
          ({"bridge": NARROW}, "4", "8")])  # fmt: skip
COUNTED = {"ids.B+1": "named by its placeholders, see test_emu", "features.B+1": "named by its placeholders"}
for name in ("forward", "embed"):
    row(f"emu.Emu.{name}", _on=emu, ids=I("B T", pictured), features=F("B N C"), _fix={"T": 5, "C": 5}, _low={"B": 2},
        _free={"ids.T+1": "words may follow"} | COUNTED,
        _bad=[({"features": None}, "image tokens", "0 images")])  # fmt: skip
row("emu.Emu.hidden", _on=emu, embeds=F("B T D"), _fix={"D": 8})
row("emu.Emu.generate_embeddings", _on=emu, ids=I("B T", asked), features=F("B N C"), _fix={"T": 6, "C": 5},
    _low={"B": 2}, _free={"ids.T+1": "named by its last word, below"} | COUNTED,
    _bad=[({"ids": torch.tensor([[6, 7, 7, 1]]).repeat(3, 1)}, "id 1", "expected 6"),
          ({"features": None}, "image tokens", "0 images")])  # fmt: skip
