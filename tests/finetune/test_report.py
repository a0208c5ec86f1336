"""Path 2 from end to end with a stand-in for SmolLM2, and what is said about it."""

import json
from dataclasses import replace

import pytest
import torch

from vlm_course.finetune import exams, path_two, recipes, report, smollm
from vlm_course.finetune.engine import Report
from vlm_course.finetune.flops import Floors, step_flops
from vlm_course.finetune.plan import FinetunePlan
from vlm_course.finetune.stored import StoredRun, keep, stored_run
from vlm_course.finetune.tokenizers import for_smollm
from vlm_course.llava import SMALL
from vlm_course.pretrained import load_small

QUICK = {"steps": 3, "batch": 2, "warmup": 0.0}
RUN = Report(step=100, steps=100, loss=0.5, seconds=1800.0, samples_per_s=50.0, memory=20 * 10**9, micro_batch=4)


@pytest.fixture(scope="module")
def trained(tiny_smollm, tmp_path_factory):
    """A model, the folder of its training, and what it said of it."""
    torch.manual_seed(0)
    model, adapter = smollm.smollm_llava(load_small(), folder=tiny_smollm), for_smollm(tiny_smollm)
    folder, lines = tmp_path_factory.mktemp("run"), []
    align, instruct = (path_two.on_cpu(replace(plan, **QUICK)) for plan in (path_two.ALIGN, path_two.INSTRUCT))
    options = {"align": align, "instruct": instruct, "easy_vqa": 0.5, "images": 4, "turns": 1, "length": 320}
    stages = path_two.learn_to_see(model, adapter, folder, device="cpu", log=lines.append, **options)
    return model, adapter, stages, lines, options, folder


class TestPathTwo:
    def test_both_stages_run_and_learn(self, trained):
        model, _, stages, lines, *_ = trained
        assert [run.step for run in stages.reports] == [3, 3] and all(run.done for run in stages.reports)
        assert not model.training
        assert any("align: scenes" in line for line in lines) and any("easy-VQA" in line for line in lines)
        curve = report.losses(*stages.folders)
        assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]
        assert curve[-1][1] < curve[0][1]

    def test_a_run_that_was_finished_does_nothing_again(self, trained, tiny_smollm):
        _, adapter, _, _, options, folder = trained
        torch.manual_seed(0)
        other = smollm.smollm_llava(load_small(), folder=tiny_smollm)
        again = path_two.learn_to_see(other, adapter, folder, device="cpu", log=lambda _: None, **options)
        assert [run.step for run in again.reports] == [3, 3]
        for name, tensor in trained[0].state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name

    def test_the_tower_stays_and_the_bridge_moves(self, trained, tiny_smollm):
        torch.manual_seed(0)
        fresh = smollm.smollm_llava(load_small(), folder=tiny_smollm)
        model = trained[0]
        assert torch.equal(fresh.vision.blocks[0].mlp.fc1.weight, model.vision.blocks[0].mlp.fc1.weight)
        assert not torch.equal(fresh.bridge.mlp[0].weight, model.bridge.mlp[0].weight)
        assert not torch.equal(fresh.decoder.blocks[0].mlp.up.weight, model.decoder.blocks[0].mlp.up.weight)

    def test_a_random_tower_is_another_one_of_the_same_shape(self):
        vision = load_small().model.vision
        state = torch.get_rng_state()
        tower = path_two.random_tower(vision)
        assert torch.equal(state, torch.get_rng_state())
        assert tower.config == vision.config and not any(p.requires_grad for p in tower.parameters())
        assert not torch.equal(tower.blocks[0].mlp.fc1.weight, vision.blocks[0].mlp.fc1.weight)
        again = path_two.random_tower(vision)
        assert torch.equal(tower.blocks[0].mlp.fc1.weight, again.blocks[0].mlp.fc1.weight)

    def test_lora_in_the_second_stage(self, tiny_smollm, tmp_path):
        model, adapter = smollm.smollm_llava(load_small(), folder=tiny_smollm), for_smollm(tiny_smollm)
        align, instruct = (path_two.on_cpu(replace(plan, **QUICK)) for plan in (path_two.ALIGN, path_two.INSTRUCT))
        instruct = replace(instruct, mode="lora", lora_rank=2, lora_alpha=4.0, lr=1e-3)
        options = {"align": align, "instruct": instruct, "easy_vqa": 0.0, "turns": 1, "length": 420}
        stages = path_two.learn_to_see(model, adapter, tmp_path, device="cpu", log=lambda _: None, **options)
        assert stages.reports[1].done and stages.seconds > 0

    def test_a_share_beyond_one(self, trained, tmp_path):
        with pytest.raises(ValueError, match="easy_vqa"):
            path_two.learn_to_see(trained[0], trained[1], tmp_path, easy_vqa=2.0, device="cpu")


class TestNumbers:
    plan = FinetunePlan(mode="full", steps=100, batch=8)

    def test_they_are_those_that_a_stored_run_knows(self, tmp_path):
        floors = Floors("G", flops=1e14, bandwidth=1e12)
        found = report.numbers(RUN, self.plan, SMALL, learning=10, tokens=200.0, floors=floors, price_per_hour=4.0)
        assert found["dollars"] == 2.0 and found["minutes"] == 30 and found["memory_gb"] == 20
        assert found["share_of_peak"] == pytest.approx(50 * step_flops(SMALL, "full", 1, 200) / 1e14)
        keep(StoredRun(2, "a model", "some work", found, ((1, 2.0),)), tmp_path)
        assert stored_run(2, tmp_path).numbers == found

    def test_padding_is_no_work(self):
        floors = Floors("G", flops=1e14, bandwidth=1e12)
        share = [
            report.numbers(RUN, self.plan, SMALL, learning=1, tokens=tokens, floors=floors)["share_of_peak"]
            for tokens in (100.0, 150.5, 201.0)
        ]
        assert share[1] == pytest.approx((share[0] + share[2]) / 2)

    def test_what_was_not_measured_is_not_said(self):
        found = report.numbers(replace(RUN, memory=0), self.plan, SMALL, learning=1, tokens=1.0)
        assert found.keys().isdisjoint({"share_of_peak", "dollars", "memory_gb"})

    def test_nonsense(self):
        with pytest.raises(ValueError, match="tokens"):
            report.numbers(RUN, self.plan, SMALL, learning=1, tokens=0)
        with pytest.raises(ValueError, match="price_per_hour"):
            report.dollars(1.0, -1.0)

    def test_what_learns_is_counted_once(self, tiny_smollm):
        decoder = smollm.load_decoder(tiny_smollm)
        tied = decoder.token_embedding.weight.numel()
        decoder.requires_grad_(False)
        decoder.token_embedding.requires_grad_(True)
        assert report.learning_parameters(decoder) == tied


def tables(*values):
    return [{"colour": {"model": v, "questions": 3}, "all": {"model": v, "questions": 3}} for v in values]


class TestAccuracy:
    def test_controls_stand_beside_it(self):
        before, after, random = tables(0.1, 0.9, 0.3)
        after["colour"] |= {"blind": 0.2, "swapped": 0.15, "majority": 0.25}
        rows = report.accuracy(before, after, random_tower=random)
        assert rows["colour"] == {
            "before": 0.1, "after": 0.9, "blind": 0.2, "swapped": 0.15, "majority": 0.25, "random tower": 0.3,
        }  # fmt: skip
        assert rows["all"] == {"before": 0.1, "after": 0.9, "random tower": 0.3}

    def test_tables_of_two_exams(self):
        before, after = tables(0.1, 0.9)
        with pytest.raises(ValueError, match="before and after differ in 1 kinds"):
            report.accuracy(before, {"colour": after["colour"]})

    def test_side_by_side(self):
        exam = exams.scene_exam(2, kinds=("colour", "count"))
        shown = report.side_by_side(exam, ["x"] * len(exam), list(exam.answer))
        assert len(shown) == 2
        assert all(one["truth"] == one["after"] != one["before"] == "x" for one in shown)
        assert report.side_by_side(exam, ["x"] * len(exam), ["y"] * len(exam), [0])[0]["question"] == exam.question[0]
        with pytest.raises(ValueError, match="one each"):
            report.side_by_side(exam, [], [])


class TestLosses:
    def test_long_curves_are_averaged_to_few_points(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            lines = [json.dumps({"step": s, "loss": float(s)}) for s in range(1, 51)]
            (tmp_path / name / "log.jsonl").write_text("\n".join(lines) + "\n")
        curve = report.losses(tmp_path / "a", tmp_path / "b", most=20)
        assert len(curve) == 20 and curve[0] == (5, 3.0) and curve[-1] == (100, 48.0)

    def test_no_steps(self, tmp_path):
        with pytest.raises(ValueError, match="hold 0 steps"):
            report.losses(tmp_path)


def test_threads_that_read_ahead_change_nothing(tiny_smollm):
    from concurrent.futures import ThreadPoolExecutor

    small = load_small()
    adapter = for_smollm(tiny_smollm)
    model = smollm.smollm_llava(small, folder=tiny_smollm)
    source = recipes.instruct_batches(adapter, model.config, rows=2, length=400)
    alone = [source(step).ids for step in range(6)]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(alone, pool.map(lambda step: source(step).ids, range(6)), strict=True):
            assert torch.equal(one, other)
