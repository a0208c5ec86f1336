"""Two trainings from one seed, in processes of their own, are the same bits; another seed is not."""

import torch

from benchmarks.repeat_training import differing, main
from vlm_course.pretrained.recipe import STAGES

QUICK = ["--device", "cpu", "--scale", "1e-9", "--batch", "2"]


def test_two_processes_train_the_same_weights(capsys):
    assert main(QUICK) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [
        [s.name, "0", "of", line.split()[3]] for s, line in zip(STAGES, lines, strict=True)
    ]


def test_a_difference_is_counted(tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        for stage in STAGES:
            torch.save({"model": {"a": torch.zeros(2), "b": torch.ones(3)}}, folder / f"{stage.name}.pt")
    assert set(differing(*folders).values()) == {(0, 2)}
    torch.save({"model": {"a": torch.tensor([0.0, 1e-30]), "b": torch.ones(3)}}, folders[1] / "align.pt")
    assert differing(*folders)["align"] == (1, 2)
