"""`make mutate`: change the package on purpose, one spot at a time, and count the changes that no test notices.

    python tests/mutate.py [MODULE ...] [--survivors] [--fresh] [--most 10] [--jobs 2] [--minutes 30]

tests/mutants/spots.py says which changes are tried; words of messages stay as they are. On each run the tests of
tests/properties and tests/parity that reach the changed statement, those of files that name the module first, until one
fails. A survivor is a missing test, or a change that means the same: docs/mutation.md says which is which, and the
survivors are printed under its headings. Results are kept in runs/mutation: a run that was stopped goes on where it
was, `--survivors` tries only what was not killed, `--fresh` forgets. Timeouts are counted apart. Not for Windows, which
cannot fork.
"""

import argparse
import hashlib
import json
import os
import random
import re
import sys
import time
from pathlib import Path

from mutants.spots import MODULES

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["HYPOTHESIS_PROFILE"] = "mutants"  # a failure is enough, no need to look for the smallest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tests/properties", "tests/parity")
WIDE = (8, 7, 8, 10, 10, 9, 8)  # columns of the table
NOTES = ROOT / "docs" / "mutation.md"
KEPT = ROOT / "runs" / "mutation"


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def load(name: str) -> dict:
    path = KEPT / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def keep(name: str, what: dict) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"{name}.json"
    path.with_suffix(".part").write_text(json.dumps(what, indent=0))
    path.with_suffix(".part").replace(path)


def explained() -> dict[str, str]:
    """{name of a mutant: the heading it stands under} from the notes."""
    heading, found = "", {}
    for line in NOTES.read_text(encoding="utf-8").splitlines() if NOTES.is_file() else ():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif match := re.match(r"- `(.+? -> .+?)`(?:[:.]|$)", line):
            found[match[1]] = heading
    return found


def reached(session, texts: dict[str, str]) -> dict[str, dict]:
    """{test: its seconds and the lines of the modules that it runs}; only files that changed are run again."""
    from mutants.session import fork, reach

    files = {str(ROOT / "vlm_course" / f"{name}.py"): name for name in texts}
    known, stamp = load("reach"), digest(*texts.values())
    by_file: dict[str, list] = {}
    for item in session.items:
        by_file.setdefault(str(item.path.relative_to(ROOT)), []).append(item)
    stamps = {file: digest(stamp, (ROOT / file).read_text(encoding="utf-8")) for file in by_file}
    known = {file: known[file] for file in by_file if known.get(file, {}).get("stamp") == stamps[file]}
    todo = [file for file in by_file if file not in known]
    for number, file in enumerate(todo):
        print(f"\r{number} of {len(todo)} test files run as they are", end="", flush=True, file=sys.stderr)
        KEPT.mkdir(parents=True, exist_ok=True)
        answer = KEPT / "answer.json"
        answer.unlink(missing_ok=True)
        os.waitpid(fork(lambda items=by_file[file], answer=answer: reach(items, files, answer) or 0), 0)
        words = set(re.findall(r"\w+", (ROOT / file).read_text(encoding="utf-8")))
        found = {
            test: facts | {"names": sorted(words & set(texts))}
            for test, facts in json.loads(answer.read_text()).items()
        }
        known[file] = {"stamp": stamps[file], "tests": found}
        keep("reach", known)
    tests = {test: facts for file in known.values() for test, facts in file["tests"].items()}
    for test, facts in tests.items():
        if "broken" in facts:
            print(f"\n{test} fails on the package as it is and is left out: {facts['broken'][-300:]}", file=sys.stderr)
    return {test: facts for test, facts in tests.items() if "broken" not in facts}


def chosen(mutant, tests: dict[str, dict], most: float) -> tuple[list[str], float]:
    """The tests that reach the mutant's statement, up to `most` seconds, and what they cost.

    First come those of files that name the module, of these the quickest.
    """
    lines = set(range(mutant.span[0], mutant.span[1] + 1))
    hits = [test for test, facts in tests.items() if lines.intersection(facts["lines"].get(mutant.module, ()))]
    taken, cost = [], 0.0
    for test in sorted(hits, key=lambda test: (mutant.module not in tests[test]["names"], tests[test]["seconds"])):
        if taken and cost + tests[test]["seconds"] > most:
            break
        taken.append(test)
        cost += tests[test]["seconds"]
    return taken, cost


def run(session, mutants: list, tests: dict[str, dict], functions, options, until: float):
    """Yields (mutant, outcome, the test that noticed it) as runs end, none begun after `until`."""
    from mutants.session import FAILED, PASSED, failure, fork, outcome

    items = {item.nodeid: item for item in session.items}
    waiting, running = list(reversed(mutants)), {}

    def work(mutant, names, answer):
        if not functions.change(mutant):
            answer.write_text("no function with this code is in memory")
            return 4
        todo = [items[name] for name in names if name in items]
        for item, following in zip(todo, [*todo[1:], None], strict=True):
            if failure(item, following):
                answer.write_text(item.nodeid)
                return FAILED
        return PASSED

    while waiting or running:
        if time.monotonic() > until:
            waiting.clear()
        while waiting and len(running) < options.jobs:
            mutant = waiting.pop()
            names, cost = chosen(mutant, tests, options.most)
            if not names:
                yield mutant, "survived", "no test reaches it"
                continue
            answer = KEPT / f"answer-{len(waiting)}.txt"
            answer.write_text("")
            child = fork(lambda m=mutant, n=names, a=answer: work(m, n, a), seconds=15 + 8 * cost)
            running[child] = (mutant, answer, time.monotonic() + 600)
        time.sleep(0.01)
        for child, (mutant, answer, latest) in list(running.items()):
            if time.monotonic() > latest:
                os.kill(child, 9)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del running[child]
                yield mutant, outcome(status), answer.read_text()
                answer.unlink()


def report(results: dict[str, dict], counts: dict[str, int], seconds: float) -> float:
    """Prints survivors under the headings of the notes, timeouts, and the counts by module; returns the share."""
    notes = explained()
    left = {name: facts for kept in results.values() for name, facts in kept["mutants"].items() if facts[0] != "killed"}
    groups: dict[str, list[str]] = {}
    for name, (result, test, line) in left.items():
        heading = notes.get(name, "Not explained") if result == "survived" else result.capitalize()
        groups.setdefault(heading, []).append(f"  line {line}: {name}" + (f"  [{test}]" if test else ""))
    for heading in sorted(groups):
        print(f"\n{heading} ({len(groups[heading])})", *groups[heading], sep="\n")
    words = {name for name, heading in notes.items() if "message" in heading.lower()}
    heads = zip(("mutants", "tried", "killed", "survived", "of words", "timeout", "share"), WIDE, strict=True)
    print(f"\n{'module':<12}" + "".join(f"{head:>{width}}" for head, width in heads))
    total = [0] * 6
    for module, kept in results.items():
        tried = [result for result, *_ in kept["mutants"].values()]
        survived = [name for name, facts in kept["mutants"].items() if facts[0] == "survived"]
        wording = len(words.intersection(survived))
        row = [counts[module], len(tried), tried.count("killed"), len(survived) - wording, wording]
        row += [len(tried) - sum(row[2:])]
        total = [a + b for a, b in zip(total, row, strict=True)]
        print(f"{module:<12}{_row(row)}")
    print(f"{'all':<12}{_row(total)}\n{seconds / 60:.1f} minutes; the share leaves out words of messages and timeouts.")
    return total[2] / max(1, total[2] + total[3])


def _row(row: list[int]) -> str:
    share = row[2] / max(1, row[2] + row[3])
    return "".join(f"{number:>{width}}" for number, width in zip(row, WIDE, strict=False)) + f"{share:>{WIDE[-1]}.1%}"


def main() -> int:
    """Prints the survivors and the counts by module; returns 1 below 85 percent killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)}; all by default")
    parser.add_argument("--survivors", action="store_true", help="try again what was not killed")
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    parser.add_argument("--minutes", type=float, default=30, help="start no further mutant after so long")
    parser.add_argument("--most", type=float, default=10, help="seconds of tests a mutant; the slowest are left out")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    options = parser.parse_args()
    if unknown := set(options.modules) - set(MODULES):
        parser.error(f"no module {', '.join(sorted(unknown))}: choose from {', '.join(MODULES)}")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    began, shares = time.monotonic(), []

    def work(session) -> None:
        from mutants.session import Functions
        from mutants.spots import mutants

        files = {name: ROOT / "vlm_course" / f"{name}.py" for name in MODULES}
        texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
        functions = Functions({name: (str(files[name]), text) for name, text in texts.items()})
        tests = reached(session, texts)
        print(f"\r{len(tests)} tests, {(time.monotonic() - began) / 60:.1f} minutes so far", file=sys.stderr)
        results, counts, queue = {}, {}, []
        for name in options.modules or MODULES:
            every, stamp = mutants(name, texts[name]), digest(texts[name])
            kept = {} if options.fresh else load(name)
            if kept.get("stamp") != stamp:
                kept = {"stamp": stamp, "mutants": {}}
            again = kept["mutants"] if not options.survivors else {
                name: facts for name, facts in kept["mutants"].items() if facts[0] == "killed"
            }  # fmt: skip
            queue += [mutant for mutant in every if mutant.name not in again]
            results[name], counts[name] = kept, len(every)
        random.Random(0).shuffle(queue)  # so that what the time allows is a fair sample of all
        for number, (mutant, *facts) in enumerate(
            run(session, queue, tests, functions, options, began + 60 * options.minutes)
        ):
            results[mutant.module]["mutants"][mutant.name] = [*facts, mutant.line]
            keep(mutant.module, results[mutant.module])
            if number % 10 == 9:
                print(f"\r{number + 1} of {len(queue)} mutants tried", end="", flush=True, file=sys.stderr)
        shares.append(report(results, counts, time.monotonic() - began))

    from mutants.session import collect

    code = collect(list(FOLDERS), work)
    return int(shares[0] < 0.85) if shares else code or 2


if __name__ == "__main__":
    sys.exit(main())
