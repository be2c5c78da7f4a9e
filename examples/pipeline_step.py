"""One step of a pipeline: quantize as a TOML file says, export, and fail when the budget is not proven.

    python examples/pipeline_step.py CONFIG.toml MODEL_DIR OUTPUT_DIR [GGUF_FILE]

A step that is killed and run again goes on where it was. Exit codes are those of `bitween quantize`: 0 done, 1 an
error, 3 targets met only in part.
"""

import json
import math
import subprocess
import sys
from pathlib import Path


def bitween(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "bitween", *arguments], stdout=subprocess.PIPE, text=True)


def main(config: str, model: str, output: str, gguf: str | None = None) -> int:
    done = bitween("quantize", model, "--config", config, "--output", output, "--json")
    if done.returncode:
        return done.returncode
    report = json.loads(done.stdout)
    kept = {
        "saved": report["memory"]["reduction"],
        "perplexity_increase": math.expm1(report["certificate"]["increase"]),  # the proof's own estimate
        "verdict": report["certificate"]["verdict"],
    }
    Path(output, "metrics.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(kept))
    bitween("report", output)
    return bitween("export", output, "--format", "gguf", "--output", gguf).returncode if gguf else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:5]))
