"""The program `vlm-course`: thin commands, each of which imports its module only when it is called.

Exit codes: 0 done, 1 a check failed, 2 the user's input cannot be used (one sentence, no traceback).
"""

import typer

app = typer.Typer(
    name="vlm-course",
    help="Build a vision-language model part by part, and ask the one that comes with the course.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def doctor() -> None:
    """Say what is installed, which device is used, and what to do about each problem."""
    from vlm_course import doctor as examination

    raise typer.Exit(examination.main())


def main() -> None:
    app()
