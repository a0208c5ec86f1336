"""`make bench`: python -m benchmarks [NAME ...] [--device cpu]"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.shipped import shipped
from benchmarks.timing import Ratio

BENCHMARKS = {
    "vision": peers.vision,
    "prefill": peers.prefill,
    "decode": peers.decode,
    "llava": peers.whole,
    "shipped": shipped,
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs the named benchmarks, prints a line for each peer and writes them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed beside the peers, as ratios.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(BENCHMARKS)}")
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, float32")
    print(f"{'':<10}{'course':>13} {'peer':>13} {'ratio':>7}")
    rows = []
    for name in options.names or BENCHMARKS:
        for row in BENCHMARKS[name](options.device):
            print(row, flush=True)
            rows.append({**asdict(row), "ratio": row.ratio} if isinstance(row, Ratio) else {"name": name, "text": row})
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"device": options.device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
