"""The program `vlm-course`: thin commands, each of which imports its module only when it is called.

Exit codes: 0 done, 1 a check found something, 2 the input cannot be used (one sentence, no traceback; set
VLM_COURSE_TRACEBACK=1 to see where it came from).
"""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="vlm-course",
    help="Build a vision-language model part by part, and ask the one that comes with the course.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train = typer.Typer(help="Train the models that the course ships, from nothing.", no_args_is_help=True)
app.add_typer(train, name="train")


class Suite(StrEnum):
    """Sets of questions that `evaluate` knows."""

    scenes = "scenes"
    easy_vqa = "easy-vqa"


@app.command()
def lab(
    browser: Annotated[
        bool | None,
        typer.Option("--browser/--no-browser", help="Open a browser.", show_default="where there is a display"),
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="First port to try.")] = None,
) -> None:
    """Copy the notebooks once into work/ and open them in JupyterLab; your changes are never overwritten."""
    from vlm_course import lab as laboratory

    root = laboratory.course_root()
    for line in laboratory.describe(laboratory.copy_notebooks(root)):
        typer.echo(line)
    raise typer.Exit(laboratory.start(root, browser=browser, port=port))


@app.command()
def update() -> None:
    """Bring newer notebooks into work/: in place of copies you never changed, beside the others."""
    from vlm_course import lab as laboratory

    report = laboratory.update_notebooks(laboratory.course_root())
    for line in laboratory.describe(report) or ["Your notebooks are up to date."]:
        typer.echo(line)
    raise typer.Exit(1 if report.blocked else 0)


@app.command()
def doctor() -> None:
    """Say what is installed, which device is used, and what to do about each problem."""
    from vlm_course import doctor as examination

    raise typer.Exit(examination.main())


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="A PNG, JPEG or other picture.", show_default=False)],
    question: Annotated[str, typer.Argument(help="One question about it.", show_default=False)],
    boxes: Annotated[Path | None, typer.Option(help="Draw what the answer points to into this PNG.")] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="List every tensor on the way from the image to the answer.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask the shipped model a question about an image."""
    from vlm_course import ask as answering

    raise typer.Exit(answering.main(image, question, boxes, trace, json))


@app.command()
def trace(
    model: Annotated[
        str,
        typer.Argument(
            help="small, or a model of the catalog, such as llava-1.5-13b or qwen2.5-vl-7b; nothing is downloaded, "
            "and none is allocated.",
            show_default=False,
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List stage, name, shape, dtype and meaning of every tensor in a model, published or shipped."""
    from vlm_course import trace as tracing

    if model == "small":
        from vlm_course.llava import SMALL

        rows = tracing.trace_config(SMALL)
    else:
        import gc

        from vlm_course.catalog import find

        gc.disable()  # a seventh of the seconds would go to collecting while the libraries load
        try:
            from vlm_course.catalog.tracing import trace_model

            rows = trace_model(find(model))
        finally:
            gc.enable()
    typer.echo(tracing.to_json(rows) if json else tracing.format_table(rows))


@app.command()
def check(
    chapter: Annotated[str, typer.Argument(help="Number of a chapter, such as 02.", show_default=False)],
    exercise: Annotated[str | None, typer.Option(help="Only this exercise.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="A .py or .ipynb with the answers; else your copy in work/.")
    ] = None,
) -> None:
    """Check your answers to a chapter's exercises."""
    from vlm_course.grading import runner

    report = runner.check_file(chapter, exercise, file)
    typer.echo(str(report))
    raise typer.Exit(report.exit_code)


@app.command()
def progress() -> None:
    """Show what you have answered and how well your confidence matched."""
    from vlm_course import progress as record

    typer.echo(record.summary())


@app.command()
def build(
    chapters: Annotated[
        list[str] | None, typer.Argument(help="Numbers or slugs; all by default.", show_default=False)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the committed notebooks; execute nothing.")
    ] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Renew the measured seconds and memory.")] = False,
) -> None:
    """Make the notebooks from solutions/*.py (for authors)."""
    from vlm_course import build as building

    raise typer.Exit(building.main(chapters or None, check=check, measure=measure))


@train.command()
def small(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the weights.")] = Path("runs/small"),
    stage: Annotated[str | None, typer.Option(help="Stop after this stage; to the end by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.", show_default="the first of them here")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same weights and scenes.")] = 0,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Stop in good time, with everything saved.")] = None,
    scale: Annotated[float, typer.Option(min=1e-4, help="A rehearsal: this share of the steps.")] = 1.0,
) -> None:
    """Train the shipped model again from nothing, in four stages; a second call goes on where the first one stopped."""
    from vlm_course.pretrained import recipe

    device = _fastest_device() if device is None else device
    if not recipe.train_small(out, device=device, seed=seed, stage=stage, minutes=minutes, scale=scale):
        typer.echo("Not finished; the same command goes on from here.")


def _fastest_device() -> str:
    """The fastest kind of device that torch finds here."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="Name of a study, or `all`.", show_default=False)],
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.", show_default="the first of them here")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every variant.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the results; finished runs are skipped.")] = Path("runs/study"),
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Stop in good time, with everything saved.")] = None,
    scale: Annotated[float, typer.Option(min=1e-4, max=1.0, help="A rehearsal: this share of the steps.")] = 1.0,
) -> None:
    """Train the tiny models of a chapter's comparison again; a second call goes on where the first one stopped."""
    import time

    from vlm_course import studies
    from vlm_course.studies import common

    device = _fastest_device() if device is None else device
    chosen = [studies.study(each) for each in (studies.STUDIES if name == "all" else [name])]
    deadline = time.monotonic() + 60 * minutes if minutes else None
    for each in chosen:
        left = (deadline - time.monotonic()) / 60 if deadline else None
        done = common.run_study(each, device=device, seeds=seeds, out=out, minutes=left, scale=scale)
        if done is None:
            typer.echo("Not finished; the same command goes on from here.")
            return


@app.command()
def evaluate(
    suite: Annotated[Suite, typer.Option(help="Which questions.")] = Suite.scenes,
    json: Annotated[Path | None, typer.Option(help="Write the table to this file as well.")] = None,
    n: Annotated[
        int | None,
        typer.Option("-n", min=1, help="Scenes, or questions of easy-VQA.", show_default="2,000 scenes; all questions"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    weights: Annotated[Path | None, typer.Option(help="Folder of other weights than the shipped ones.")] = None,
    tuned: Annotated[bool, typer.Option("--tuned", help="With the bridge tuned on easy-VQA.")] = False,
) -> None:
    """Measure the shipped model beside its controls: no image, a swapped image, any object, the majority answer."""
    from vlm_course import evaluation

    evaluation.main(suite.value, json_file=json, n=n, device=device, folder=weights, tuned=tuned)


@app.command()
def finetune(
    data: Annotated[
        str,
        typer.Option(
            help="LLaVA-Instruct's JSON or JSONL, its folder, or hub:owner/name/file.json.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run and of the trained model.", show_default=False)],
    model: Annotated[str, typer.Option(help="small, a LLaVA-1.5 folder, or owner/name on the hub.")] = "small",
    images: Annotated[
        Path | None, typer.Option(help="Folder that image names start from.", show_default="beside the data")
    ] = None,
    mode: Annotated[str, typer.Option(help="What learns: projector, lora or full.")] = "lora",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad records out and count them; else the first one stops.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Conversations an optimizer step.")] = 16,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Rows computed at once.", show_default="as many as fit")
    ] = None,
    epochs: Annotated[float, typer.Option(help="How often each record is read.")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of epochs.")] = None,
    lr: Annotated[float | None, typer.Option(help="Greatest learning rate.", show_default="LLaVA-1.5's")] = None,
    bridge_lr: Annotated[float | None, typer.Option(help="That of the bridge.", show_default="LLaVA-1.5's")] = None,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA's matrices.")] = 128,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Longest row, image included.", show_default="the model's longest")
    ] = None,
    pack: Annotated[bool, typer.Option("--pack", help="Several conversations in one row.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, autocast or bfloat16.", show_default="bfloat16 on a GPU")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.", show_default="cuda where there is one")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of records, LoRA's first values and dropout.")] = 0,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between two running states.")] = 600.0,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop in good time, with everything saved.")] = None,
    trust_images: Annotated[
        bool, typer.Option("--trust-images", help="Do not decode every image before training.")
    ] = False,
) -> None:
    """Fine-tune the shipped model or a LLaVA-1.5 checkpoint on your conversations; run it again to go on.

    On several GPUs: torchrun --nproc-per-node N -m vlm_course finetune ...
    """
    from vlm_course.finetune import command

    asked = {"steps": steps, "lr": lr, "bridge_lr": bridge_lr, "dtype": dtype}
    command.finetune(
        data,
        model=model,
        out=out,
        images=images,
        skip_bad=skip_bad,
        epochs=epochs,
        pack=pack,
        max_tokens=max_tokens,
        check_images=not trust_images,
        device=device,
        minutes=minutes,
        log=typer.echo,
        mode=mode,
        batch=batch,
        micro_batch=micro_batch,
        lora_rank=lora_rank,
        seed=seed,
        save_every=save_every,
        **{name: value for name, value in asked.items() if value is not None},
    )


def main() -> None:
    """Entry point: the errors that the course raises on purpose are shown as a sentence."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if os.environ.get("VLM_COURSE_TRACEBACK"):
            raise
        print(f"vlm-course: {str(error) or 'out of memory'}", file=sys.stderr)
        sys.exit(2)
