"""Chapter 8: tiles, pages and pruned tokens, and the bridges of the models that read pages."""

import torch
from bad_input_table import NO_ROW, Bool, F, I, row

from vlm_course.abstractor import AbstractorLayer, VisualAbstractor
from vlm_course.decoder import Decoder, DecoderConfig, rotary_phases
from vlm_course.documents import LayoutEmbedding
from vlm_course.h_reducer import HReducer
from vlm_course.modality_adaptive import ByKind, ModalityAdaptiveAttention, ModalityAdaptiveBlock
from vlm_course.query_resampler import QueryResampler
from vlm_course.shape_cropping import CropPositions
from vlm_course.token_resampler import TokenResampler

NAN = float("nan")
CANVASES = [(4, 8), (8, 4), (8, 8)]


def size(name):
    return [({name: (0, 5)}, "(0, 5)", "at least 1"), ({name: (5, 5, 3)}, "(5, 5, 3)", "two"),
            ({name: (5.5, 5)}, "5.5", "whole")]  # fmt: skip


NO_CANVAS = [({"resolutions": []}, "0 resolutions", "at least 1"), ({"resolutions": [(4, 0)]}, "(4, 0)", "at least 1")]
RAGGED = [({"resolutions": [(5, 8)]}, "5", "4"), ({"resolutions": [(8, 5)]}, "5", "4")]

THIN = "unpadding a thin picture may leave no row, or no column"
row("resolution.require_size", size=(4, 6), name="size", _bad=size("size"))
row("resolution.select_best_resolution", size=(5, 7), resolutions=CANVASES, _bad=[*size("size"), *NO_CANVAS])
row("resolution.fit_inside", size=(5, 7), canvas=(8, 8), _bad=[*size("size"), *size("canvas")])
row("resolution.anyres_grid", size=(5, 7), resolutions=CANVASES, tile=4, _bad=[*size("size"), *NO_CANVAS, *RAGGED])
row("resolution.divide_to_tiles", image=F("C 4r 4c"), tile=4)
row("resolution.resize", image=F("C H W"), size=(3, 5), _bad=size("size"))
row("resolution.anyres_tiles", image=F("C H W"), resolutions=CANVASES, tile=4, _bad=[*NO_CANVAS, *RAGGED])
row("resolution.unpadded_grid", grid=(3, 4), size=(5, 7), _bad=[*size("grid"), *size("size")])
row("resolution.unpad", features=F("r c D"), size=(5, 7), _bad=size("size"))
row("resolution.stitch_tiles", tiles=F("6 9 D"), grid=(2, 3), _bad=[*size("grid"), ({"grid": (2, 2)}, "6", "4")])
row(
    "resolution.add_newlines",
    features=F("r c D"),
    newline=F("D"),
    _free={"features.r=0": THIN, "features.c=0": THIN},
)
row(
    "resolution.pack_image_features",
    features=F("7 9 D"),
    size=(5, 7),
    grid=(2, 3),
    newline=F("D"),
    _bad=[*size("grid"), *size("size"), ({"grid": None}, "7", "1")],
)
row(
    "resolution.anyres_token_count",
    size=(5, 7),
    resolutions=CANVASES,
    tile=4,
    patch=2,
    _bad=[*size("size"), *NO_CANVAS, *RAGGED, ({"patch": 3}, "4", "3")],
)
row("dynamic_tiling.tile_grids", min_tiles=1, max_tiles=4, _bad=[({"min_tiles": 5}, "5", "4")])
row("dynamic_tiling.closest_grid", size=(5, 7), max_tiles=4, _bad=[*size("size"), ({"min_tiles": 5}, "5", "4")])
row("dynamic_tiling.dynamic_tiles", image=F("C H W"), tile=2, max_tiles=4, _bad=[({"min_tiles": 5}, "5", "4")])
row(
    "dynamic_tiling.dynamic_token_count",
    size=(5, 7),
    tile=8,
    patch=2,
    _bad=[*size("size"), ({"patch": 3}, "8", "6"), ({"min_tiles": 13}, "13", "12")],
)

CONFIG = DecoderConfig(vocab_size=7, width=8, layers=3, heads=2, kv_heads=1, mlp_width=6, max_positions=9)


def half(s):
    """The first half of every row is image."""
    return torch.arange(s.T).repeat(s.B, 1) < (s.T + 1) // 2


UNEVEN = ({"is_image": torch.tensor([[True, False], [True, True], [False, False]]).repeat_interleave(2, 1)[:, :4]},
          "0 image tokens", "4")  # fmt: skip
row("pruning.last_query_scores", weights=F("B H T S"))
row("pruning.kept_tokens", scores=F("B T"), is_image=Bool("B T", half), ratio=0.5, _fix={"B": 3, "T": 4},
    _bad=[UNEVEN, ({"ratio": 1.5}, "1.5", "1"), ({"scores": torch.full((3, 4), NAN)}, "12 of 12", "NaN"),
          ({"is_image": torch.zeros(3, 4)}, "float32", "bool")])  # fmt: skip
row("pruning.prune", hidden=F("B T D"), kept=I("B K"),
    _bad=[({"kept": torch.full((3, 2), 9)}, "9..9", "0.."), ({"kept": torch.full((3, 2), -1)}, "-1..-1", "0..")],
    _fix={"B": 3})  # fmt: skip
NO_ROW["pruning.Pruned"] = "what prefill_pruned gives back"
row("pruning.prefill_pruned", decoder=lambda s: Decoder(CONFIG), embeds=F("B T D"), is_image=Bool("B T", half),
    layer=1, ratio=0.5, _fix={"B": 3, "T": 4, "D": 8},
    _bad=[UNEVEN, ({"layer": 4}, "4", "1 to 3"), ({"ratio": 1.5}, "1.5", "1"),
          ({"embeds": torch.zeros(3, 10, 8), "is_image": torch.zeros(3, 10).bool()}, "10 tokens", "9")])  # fmt: skip
row("pruning.flops_kept", tokens=9, images=4, ratio=0.5, layer=1, layers=3, width=4, mlp_width=5,
    _least={"images": 0, "layer": 0},
    _bad=[({"images": 10}, "10", "9"), ({"layer": 4}, "4", "3"), ({"ratio": 1.5}, "1.5", "1")])  # fmt: skip


def page(name):
    return [
        ({name: (0, 5)}, "0", "above 0"),
        ({name: (5, 5, 3)}, "3 numbers", "2"),
        ({name: (NAN, 5)}, "nan", "finite"),
    ]


def corners(s):
    return torch.randint(0, 9, (s.B, s.T, 2, 2)).sort(dim=2).values.flatten(2)


BOXES = [({"boxes": torch.tensor([[[0, 0, 2000, 5]]])}, "2000", "<="), ({"boxes": torch.tensor([[[5, 5, 4, 6]]])},
         "(5, 4)", "left <= right"), ({"boxes": torch.tensor([[[5, 5, 6, 4]]])}, "(5, 4)", "top <= bottom"),
         ({"boxes": torch.tensor([[[-1, 5, 6, 7]]])}, "-1", "0 <=")]  # fmt: skip
row("documents.points_to_pixels", points=12.0, dpi=72.0)
row("documents.page_pixels", page=(792, 612), dpi=72.0, _bad=page("page"))
row("documents.fit_scale", size=(792, 612), canvas=(336, 336), _bad=[*page("size"), *page("canvas")])
row("documents.x_height_pixels", font_points=12.0, dpi=72.0)
row("documents.dpi_for_x_height", font_points=12.0, pixels=5.0)
row("documents.normalise_boxes", boxes=I("B T 4", corners), page=(10, 9),
    _free={"boxes.rank": "boxes in lists of any depth", "boxes.B=0": "a page may have no words",
           "boxes.T=0": "a page may have no words"},
    _bad=[*BOXES, *page("page"), ({"boxes": torch.full((1, 4), NAN)}, "4 of 4", "NaN")])  # fmt: skip
row("documents.token_boxes", boxes=I("3 4"), words=[None, 0, 2],
    _free={"boxes.3=0": "a page may have no words", "boxes.3+1": "a word may have no token"},
    _bad=[({"words": [3]}, "3", "0..2"), ({"words": [-1]}, "-1", "0..2")])  # fmt: skip
row("documents.LayoutEmbedding", width=4, coordinates=10)
row("documents.LayoutEmbedding.forward", _on=lambda s: LayoutEmbedding(4), boxes=I("B T 4", corners), _bad=BOXES)

# --- UReader, DocOwl

PAGE_GRID = [({"grid": (0, 3)}, "(0, 3)", "at least 1"), ({"grid": (2, 3, 4)}, "(2, 3, 4)", "two")]
row("shape_cropping.crop_grids", max_cells=4, max_side=3)
row("shape_cropping.corner_overlap", one=(5, 7), other=(3, 9), _bad=[*size("one"), *size("other")])
row("shape_cropping.grid_scores", size=(5, 7), grid=(2, 3), tile=4, _bad=[*size("size"), *PAGE_GRID])
row("shape_cropping.choose_grid", size=(5, 7), tile=4, max_cells=4, max_side=3, _bad=size("size"))
row("shape_cropping.crop_places", grid=(2, 3), whole=4, _bad=[*PAGE_GRID, ({"whole": 2}, "3", "2")])
row("shape_cropping.shape_adaptive_crops", image=F("C H W"), tile=2, max_cells=4, max_side=3)
row("shape_cropping.crop_token_count", size=(5, 7), tokens=3, tile=4, max_cells=4, max_side=3, _bad=size("size"))
row("shape_cropping.crop_words", places=I("v 2"), whole=9)
row("shape_cropping.CropPositions", dim=4, places=3)
row("shape_cropping.CropPositions.forward", _on=lambda s: CropPositions(4, places=3), tokens=F("v M D"),
    places=I("v 2"), _fix={"D": 4}, _low={"v": 2},
    _bad=[({"places": torch.full((2, 2), 3), "tokens": torch.zeros(2, 1, 4)}, "3", "0 to 2")])  # fmt: skip
row("h_reducer.HReducer", vision_dim=3, llm_dim=4, merge=2)
row("h_reducer.HReducer.forward", _on=lambda s: HReducer(3, 4, merge=2), features=F("B 6 D"), grid=(3, 2),
    _fix={"D": 3},
    _bad=[*PAGE_GRID, ({"grid": (3, 3)}, "6", "9"), ({"grid": (2, 3)}, "3", "2"),
          ({"grid": None}, "6", "4")])  # fmt: skip
row("abstractor.AbstractorLayer", dim=6, heads=2, mlp_width=5, _bad=[({"heads": 4}, "6", "4")])
row("abstractor.AbstractorLayer.forward", _on=lambda s: AbstractorLayer(6, 2, 5), queries=F("B M D"),
    features=F("B N D"), _fix={"D": 6}, _low={"B": 2})  # fmt: skip
row("abstractor.VisualAbstractor", vision_dim=6, llm_dim=4, queries=2, layers=1, heads=2, mlp_width=5,
    _least={"places": 0}, _bad=[({"heads": 4}, "6", "4")])  # fmt: skip
row("abstractor.VisualAbstractor.forward",
    _on=lambda s: VisualAbstractor(6, 4, queries=2, layers=1, heads=2, mlp_width=5, places=3),
    features=F("B N D"), places=I("B 2"), _fix={"D": 6}, _low={"B": 2},
    _bad=[({"places": None}, "no places", "3 rows")])  # fmt: skip

# --- Qwen-VL, TextMonkey

row("query_resampler.sincos_positions", side=2, dim=8, _least={"dim": 4}, _bad=[({"dim": 6}, "6", "4")])
row("query_resampler.QueryResampler", vision_dim=3, llm_dim=8, queries=4, heads=2, _least={"llm_dim": 4},
    _bad=[({"queries": 3}, "3", "square"), ({"llm_dim": 6}, "6", "4"), ({"heads": 3}, "8", "3")])  # fmt: skip
row("query_resampler.QueryResampler.forward", _on=lambda s: QueryResampler(3, 8, queries=4, heads=2),
    features=F("B 9 D"), _fix={"D": 3})  # fmt: skip
row("query_resampler.QueryResampler.key_positions", _on=lambda s: QueryResampler(3, 8, queries=4, heads=2), patches=9,
    _bad=[({"patches": 8}, "8", "square")])  # fmt: skip
row("token_resampler.distinct_tokens", tokens=F("B 4 D"), keep=3, _free={"tokens.4+1": "more tokens may be given"},
    _bad=[({"keep": 5}, "5", "4")])  # fmt: skip
row("token_resampler.TokenResampler", dim=4, inner=6, heads=2, keep=3, _bad=[({"heads": 4}, "6", "4")])
row("token_resampler.TokenResampler.forward", _on=lambda s: TokenResampler(4, inner=6, heads=2, keep=3),
    tokens=F("B 4 D"), _fix={"D": 4}, _free={"tokens.4+1": "more tokens may be given"},
    _bad=[({"tokens": torch.zeros(1, 2, 4)}, "3", "2")])  # fmt: skip


def phases(s):
    return rotary_phases(torch.arange(s.T), CONFIG.head_dim)


NUMBERS_FOR_KINDS = ({"is_image": torch.zeros(3, 4)}, "float32", "bool")
ADAPTIVE = {"x": F("B T D"), "is_image": Bool("B T"), "phases": phases}
row("modality_adaptive.ByKind", make=lambda s: torch.nn.Identity)
row("modality_adaptive.ByKind.forward", _on=lambda s: ByKind(lambda: torch.nn.Linear(2, 2)), x=F("B T D"),
    is_image=Bool("B T"), _fix={"B": 3, "T": 4, "D": 2}, _bad=[NUMBERS_FOR_KINDS],
    _free={"x.D+1": "the two modules say which width they take"})  # fmt: skip
for name, kind in (("Attention", ModalityAdaptiveAttention), ("Block", ModalityAdaptiveBlock)):
    row(f"modality_adaptive.ModalityAdaptive{name}", config=CONFIG, _bad=[({"config": None}, "NoneType", "expected")])
    row(f"modality_adaptive.ModalityAdaptive{name}.forward", _on=lambda s, kind=kind: kind(CONFIG), **ADAPTIVE,
        _fix={"B": 3, "T": 4, "D": 8}, _bad=[NUMBERS_FOR_KINDS])  # fmt: skip
row("modality_adaptive.twin_parameters", width=4, layers=2, kv_width=3)
