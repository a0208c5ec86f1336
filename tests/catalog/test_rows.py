"""Behind every open system of the lesson's tables stands a mechanism of this course and a test that runs it.

The tests named here exist, are collected, and run the mechanism itself against an oracle or the published format; that
each system can be built and counted, and its forward pass traced, is tested in test_building.py and test_tracing.py.
"""

import ast
import functools
import importlib.util
import pkgutil
from pathlib import Path

import pytest

from vlm_course.catalog import find

TESTS = Path(__file__).parents[1]

# system of the lesson's tables -> (what of it this course has, in modules of vlm_course; the tests that run that)
ROWS = {
    "CLIP ViT-L/14": ("vit.VisionTransformer",
                      ["parity/test_vision_towers.py::test_every_hidden_state_equals_transformers",
                       "parity/test_encoders.py::test_timm_builds_the_table"]),
    "SigLIP": ("contrastive.sigmoid_loss", ["parity/test_vision_towers.py::test_sigmoid_loss_equals_transformers",
                                            "parity/test_encoders.py::test_timm_builds_the_table"]),
    "EVA-CLIP": ("encoders.ENCODERS", ["parity/test_encoders.py::test_timm_builds_the_table"]),
    "DINOv2": ("encoders.ENCODERS", ["parity/test_encoders.py::test_timm_builds_the_table"]),
    "LLaVA": ("bridges.LinearBridge", ["claims/test_ch02.py::test_version_1_has_256_tokens"]),
    "LLaVA-1.5": ("llava.Llava", ["parity/test_vision_bridges.py::test_vision_projection_equals_llavas_projector",
                                  "parity/test_llava_whole.py"]),
    "Flamingo": ("fusion.GatedCrossAttention", ["parity/test_language_idefics.py::test_gated_cross_attention",
                                                "parity/test_vision_bridges.py::test_perceiver_resampler_equals_idefics"]),
    "Qwen-VL": ("query_resampler.QueryResampler", ["parity/test_resamplers.py::test_query_resampler_is_qwen_vls"]),
    "Honeybee": ("bridges.CAbstractor", ["parity/test_vision_bridges.py::test_c_abstractor_equals_the_regnet_oracle"]),
    "Fuyu": ("fuyu.LinearPatches", ["parity/test_fuyu.py::test_linear_patches"]),
    "InternVL": ("bridges.ShuffleProjection", ["parity/test_qformer.py::test_shuffled_projection_is_internvls"]),
    "InternVL 1.5": ("dynamic_tiling.dynamic_tiles",
                     ["parity/test_resolution.py::test_dynamic_views_equal_those_of_the_image_processor"]),
    "InternVL 2.5": ("dynamic_tiling.closest_grid", ["parity/test_resolution.py::test_dynamic_grid_for_every_size"]),
    "PaliGemma": ("attention.prefix_mask", ["parity/test_masks.py::test_prefix_as_paligemma_has_it",
                                            "parity/test_grounding.py::test_paligemma_spends_the_processors_tokens"]),
    "Kosmos-2": ("grounding.Kosmos2", ["parity/test_grounding.py::test_kosmos2_cells_equal_the_processors"]),
    "Shikra": ("grounding.Shikra", ["properties/test_grounding.py::test_a_place_looks_as_published"]),
    "Qwen2.5-VL": ("grounding.Qwen25VL",
                   ["properties/test_grounding.py::test_qwen25_pixels_are_those_of_the_resized_image"]),
    "Qwen2-VL": ("video.TubeletEmbedding", ["parity/test_video.py::test_positions_are_qwen2s",
                                            "parity/test_video.py::test_tubelets_are_qwen2s"]),
    "DocOwl": ("abstractor.VisualAbstractor", ["parity/test_page_bridges.py::test_abstractor_layer_is_the_loop"]),
    "DocOwl 1.5": ("h_reducer.HReducer", ["parity/test_page_bridges.py::test_h_reducer_is_the_loop",
                                          "parity/test_modality_adaptive.py::test_tokens_of_one_kind_pass_a_llama_layer"]),
    "UReader": ("shape_cropping.shape_adaptive_crops",
                ["parity/test_shape_cropping.py::test_the_released_rule_chooses_the_same_grid",
                 "parity/test_page_bridges.py::test_the_whole_abstractor_is_its_layers_the_places_a_map_and_an_end"]),
    "TextMonkey": ("token_resampler.TokenResampler",
                   ["parity/test_resamplers.py::test_token_resampler_is_the_formula"]),
    "Nougat": ("catalog.building.build", ["claims/test_ch08.py::test_nougat_takes_pixels_and_writes_text"]),
    "Donut": ("catalog.building.build", ["catalog/test_building.py::test_counts_are_those_of_the_module"]),
    "LLaVA-NeXT": ("resolution.pack_image_features",
                   ["parity/test_resolution.py::test_packing_and_counting_for_every_size"]),
    "Molmo": ("grounding.Molmo", ["properties/test_grounding.py::test_a_place_looks_as_published",
                                  "catalog/test_modules.py::test_molmos_connector_is_the_loop"]),
    "OpenVLA": ("actions.ActionTokenizer", ["properties/test_actions.py::test_ids_and_numbers_are_those_of_openvla"]),
    "Emu": ("emu.next_element_loss", ["parity/test_emu.py::test_causal_former_is_t5s_decoder",
                                      "parity/test_emu.py::test_loss_is_the_loop"]),
    "Emu3": ("catalog.building.build", ["catalog/test_tracing.py"]),
    "BLIP-2": ("qformer.QFormer", ["parity/test_qformer.py::test_queries_without_an_instruction_are_blip2s"]),
    "InstructBLIP": ("qformer.QFormer", ["parity/test_qformer.py::test_queries_with_an_instruction_are_instructblips"]),
}  # fmt: skip


@functools.cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("system", ROWS)
def test_the_mechanism_exists_and_so_do_its_tests(system):
    mechanism, tests = ROWS[system]
    assert find(system).access != "closed"
    assert pkgutil.resolve_name(f"vlm_course.{mechanism}") and tests
    for test in tests:
        file, _, function = test.partition("::")
        names = names_in(file)
        assert names and (not function or function in names), test


def test_no_open_system_of_the_tables_is_left_out():
    spec = importlib.util.spec_from_file_location("catalog_building", Path(__file__).with_name("test_building.py"))
    building = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(building)
    assert set(building.OPEN_SYSTEMS) == set(ROWS)
