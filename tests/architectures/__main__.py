"""`python -m tests.architectures [TYPE ...]`: run every check on every type, each in a process of its own.

Writes one JSON file a type to build/architectures/, in a folder for the version of transformers. `--missing` leaves out
the types that have one, so that a run can go on where it ended. The table docs/architectures.md is written when all
types were asked for, and by `--table`; types without a result keep the row that it has for them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import multiprocessing.connection
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

_SECONDS = 900  # of CPU time for all checks of one type; four times this of the clock, as others may compute too
_RESULTS = Path("build/architectures")
_TABLE = Path("docs/architectures.md")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    parser.add_argument("--checks", default="", help="names of checks, with commas between (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--missing", action="store_true", help="only types without a result")
    parser.add_argument("--table", action="store_true", help="write the table from the results that there are, and end")
    asked = parser.parse_args()
    from tests.architectures.table import write

    if asked.table:
        write(_RESULTS, _TABLE)
        return 0
    import transformers

    from tests.architectures.tiny import causal_types

    types, folder = asked.types or causal_types(), _RESULTS / transformers.__version__
    if asked.missing:
        types = [name for name in types if not (folder / f"{name}.json").exists()]
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, result in each_apart(types, asked.checks, asked.jobs):
        result |= {"date": time.strftime("%Y-%m-%d")}
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        bad = {k: v for k, v in result.items() if v.startswith(("WRONG", "ERROR"))}
        failed += bool(bad)
        built = not result["build"].startswith("none")
        print(name, bad or ("ok" if built else result["build"]), flush=True)
    if not asked.types and not asked.checks:
        write(_RESULTS, _TABLE)
    print(f"{len(types)} types, {failed} with a failure")
    return 1 if failed else 0


def each_apart(types: list[str], checks: str, jobs: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Run every type in a process of its own, forked from this one, which has the libraries loaded."""
    import torch
    import transformers  # noqa: F401

    import tests.architectures.checks  # noqa: F401

    torch.set_num_threads(1)
    forked = multiprocessing.get_context("fork")
    waiting, running = list(types), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            ours, theirs = forked.Pipe(duplex=False)
            process = forked.Process(target=_send, args=(theirs, name, checks), daemon=True)
            process.start()
            theirs.close()
            running[name] = process, ours, time.monotonic() + 4 * _SECONDS
        multiprocessing.connection.wait([ours for _, ours, _ in running.values()], timeout=5)
        for name, (process, ours, end) in list(running.items()):
            if ours.poll():
                try:
                    result = ours.recv()
                except EOFError:
                    process.join()
                    late = process.exitcode == -signal.SIGXCPU
                    said = f"no end within {_SECONDS} s of CPU time" if late else f"ended with {process.exitcode}"
                    result = {"build": f"ERROR {said}"}
            elif time.monotonic() > end:
                process.kill()
                result = {"build": f"ERROR no end within {4 * _SECONDS} s"}
            else:
                continue
            process.join(5)
            del running[name]
            yield name, result


def _send(pipe, model_type: str, checks: str) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 10))
    pipe.send(run(model_type, checks))


def run(model_type: str, checks: str = "") -> dict[str, str]:
    """{check: what was measured, or "WRONG ..." or "ERROR ..."}; "none ..." where transformers itself fails."""
    import torch
    import transformers

    from tests.architectures.checks import CHECKS, Subject
    from tests.architectures.tiny import examples_of, tiny_causal

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results: dict[str, str] = {}
    try:
        model = tiny_causal(model_type)
        subject = Subject(model, examples_of(model))
        results["build"] = type(subject.model).__name__
    except BaseException as error:
        return {"build": f"none {type(error).__name__}: {str(error)[:160]}"}
    for name, check in CHECKS.items():
        if checks and name not in checks.split(","):
            continue
        if subject.packed is None and name in ("generate", "save"):
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                results[name] = check(subject)
        except AssertionError as error:
            results[name] = f"WRONG {error}"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            results[name] = (
                f"ERROR {type(error).__name__}: {str(error)[:300]} @{Path(where.filename).name}:{where.lineno}"
            )
    return results


if __name__ == "__main__":
    sys.exit(main())
