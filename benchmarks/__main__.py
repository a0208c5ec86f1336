"""`make bench`: python -m benchmarks [NAME ...] [--pairs 9] [--threads 2] [--device cpu]"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.packed import packing
from benchmarks.shipped import shipped
from benchmarks.timing import HEADER, load

BENCHMARKS = {
    "vision": peers.vision,
    "prefill": peers.prefill,
    "decode": peers.decode,
    "packing": packing,
    "decoder": peers.decoder,
    "decode-medium": peers.decode_medium,
    "shipped": shipped,
}
RESULTS = Path(__file__).parent / "results"
QUIET = 0.5  # load beyond our own threads under which a ratio is believed


def main() -> int:
    """Runs the named benchmarks, prints a line for each and writes them as JSON. Returns 1 when a quiet machine says
    that a ratio is not what was asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed beside the peers, as ratios.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--pairs", type=int, default=9, help="rounds in which each contender runs once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(BENCHMARKS)}")
    if options.pairs < 1:
        parser.error(f"--pairs is {options.pairs}, but at least one round must run")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    before = load()
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, float32, {options.pairs} rounds")
    print(HEADER)
    rows = []
    for name in options.names or BENCHMARKS:
        for row in BENCHMARKS[name](options.device, options.pairs):
            print(row, flush=True)
            rows.append(row)
    after = load()
    loaded = before > QUIET or after > options.threads + QUIET
    if loaded:
        print(
            f"The load was {before:.1f} before and {after:.1f} at the end, {options.threads} of it ours: something "
            "else is running. Take these ratios as doubtful and measure again on a quiet machine."
        )
    quick = next((row for row in rows if row.name == "decode-quick"), None)
    if quick:
        reached = "is" if quick.ratio <= 0.5 else "is not"
        print(f"Half of transformers' time for a further token {reached} reached: {quick.ratio:.2f}.")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    machine = {"device": options.device, "torch": torch.__version__, "threads": options.threads, "pairs": options.pairs}
    machine |= {"load_before": before, "load_after": after, "doubtful": loaded}
    path.write_text(json.dumps({**machine, "rows": [row.as_json() for row in rows]}, indent=1) + "\n", encoding="utf-8")
    return int(not loaded and any(row.verdict == "FAIL" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
