"""Speed of fine-tuning and answering on a GPU, a row a command: python -m benchmarks.finetune ROW ... [--json FILE]

Each row measures the machine's floors, ours and the peer in the same run, and prints ratios. A variant that fails is
reported and the next one runs. `--peer` says which peers run (none, plain, tuned), `--seconds` after how long no new
variant of a row is begun.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import finetune_inference, finetune_packed, finetune_training

ROWS: dict[str, Callable] = {
    "decode": finetune_inference.decode,
    "prefill": finetune_inference.prefill,
    "projector": finetune_training.projector,
    "lora": finetune_training.lora,
    "full": finetune_training.full,
    "small": finetune_training.small,
    "packed": finetune_packed.packed,
    "curve": finetune_training.curve,
    "two-gpus": finetune_training.two_gpus,
}


@dataclass
class Run:
    """One row's run: what is asked for, the floors, and what came out."""

    name: str
    peers: tuple[str, ...]
    seconds: float
    only: tuple[str, ...] = ()
    save: Callable[[], None] = lambda: None  # after every variant, since the next one may end the process
    began: float = field(default_factory=time.monotonic)
    results: dict = field(default_factory=dict)

    def try_(self, name: str, work: Callable[[], dict], *, always: bool = False) -> dict | None:
        """Run a variant, print its line, keep its numbers; an error is kept in their place."""
        if self.only and name not in self.only:
            return None
        passed = time.monotonic() - self.began
        if not always and passed > self.seconds:
            print(f"{self.name:<10} {name:<28} not begun: {passed:.0f} s have passed", flush=True)
            self.results[name] = {"skipped": f"{passed:.0f} s had passed"}
            return None
        gc.collect()
        finetune_training.forget()
        start = time.monotonic()
        try:
            found = work()
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {str(error)[:600]}"}
            traceback.print_exc(limit=-6)
        found["took_s"] = round(time.monotonic() - start, 1)
        self.results[name] = found
        self.save()
        shown = "  ".join(
            f"{key} {_short(value)}" for key, value in found.items() if not isinstance(value, dict | list)
        )
        print(f"{self.name:<10} {name:<28} {shown}", flush=True)
        torch._dynamo.reset()
        return None if "failed" in found else found


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _save(path: Path | None, everything: dict) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Runs the named rows. Returns 0 also when a row was skipped: that is said, not hidden."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", choices=[*ROWS, "all"], metavar="ROW", help=f"of {', '.join(ROWS)}; or all")
    parser.add_argument("--json", type=Path, default=None, help="where all numbers go, also those of former calls")
    parser.add_argument("--peer", default="tuned", help="none, plain, tuned, or both with a comma")
    parser.add_argument("--seconds", type=float, default=150.0, help="no new variant of a row after so long")
    parser.add_argument("--only", default="", help="names of variants, with commas")
    options = parser.parse_args(arguments)
    peers = () if options.peer == "none" else tuple(options.peer.split(","))
    rows = list(ROWS) if "all" in options.rows else options.rows
    if not torch.cuda.is_available():
        print(f"No GPU: skipped {', '.join(rows)}. These rows are about one CUDA device, two-gpus about two.")
        return 0
    from vlm_course.finetune.flops import measure_floors

    everything = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
    floors = measure_floors("cuda")
    torch.cuda.empty_cache()
    machine = {"gpu": floors.name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "gpus": _gpus()}
    machine |= {"matmul_tflops": floors.flops / 1e12, "copy_TBps": floors.bandwidth / 1e12}
    print("  ".join(f"{key} {_short(value)}" for key, value in machine.items()), flush=True)
    for name in rows:
        if name == "two-gpus" and _gpus() < 2:
            print("two-gpus   skipped: this machine has 1 GPU, the row is about 2 against 1.", flush=True)
            everything[name] = {"skipped": "1 GPU"}
            continue
        run = Run(name, peers, options.seconds, tuple(filter(None, options.only.split(","))))
        kept = everything.get(name, {}).get("variants", {})

        def save(name: str = name, kept: dict = kept, run: Run = run) -> None:
            everything[name] = {"machine": machine, "variants": {**kept, **run.results}}
            _save(options.json, everything)

        run.save = save
        try:
            ROWS[name](run, floors)
        except Exception as error:
            run.results["failed"] = f"{type(error).__name__}: {str(error)[:600]}"
            traceback.print_exc(limit=-6)
        run.save()
        gc.collect()
        torch.cuda.empty_cache()
    return 0


def _gpus() -> int:
    return torch.cuda.device_count()


if __name__ == "__main__":
    sys.exit(main())
