"""llama.cpp writing tokens on command, for generate.py, in whatever Python has a package of it.

    python benchmarks/llama_generate.py FILE.gguf TOKENS THREADS

First it answers with a line that names the package. Then each line on standard input is a prompt, token ids as a JSON
list; it writes TOKENS tokens after it (or as many as "PROMPT N" says), from an empty cache and without stopping at the
end of a text, and answers with a line: the seconds of CPU time that took, in all threads. "load" loads the file anew.
It knows llama-cpp-python, xllamacpp and ik-llama-cpp-python. Exit status 3: none is installed. Needs nothing of
bitween.
"""

import json
import sys
import time

MOST = 1024  # tokens of a prompt and what follows


class Bindings:
    """llama-cpp-python, built where it is installed."""

    def __init__(self, path: str, threads: int) -> None:
        from llama_cpp import Llama

        self.llama = Llama(path, n_ctx=MOST, n_threads=threads, n_threads_batch=threads, verbose=False)

    @staticmethod
    def name() -> str:
        from llama_cpp import __version__

        return f"llama-cpp-python {__version__}"

    def write(self, ids: list[int], tokens: int) -> None:
        self.llama.reset()
        for i, _ in enumerate(self.llama.generate(ids, temp=0.0), start=1):
            if i == tokens:  # not llama(...), which stops at the end of the text
                break


class Server:
    """xllamacpp, which comes as wheels; llama.cpp's own server without a network."""

    def __init__(self, path: str, threads: int) -> None:
        from xllamacpp import CommonParams
        from xllamacpp import Server as Theirs

        params = CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = MOST, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = Theirs(params)

    @staticmethod
    def name() -> str:
        from xllamacpp import __version__

        return f"xllamacpp {__version__}"

    def write(self, ids: list[int], tokens: int) -> None:
        asked = {"prompt": ids, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        answer = self.server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "error" in answer or answer["usage"]["completion_tokens"] != tokens:
            raise SystemExit(f"llama.cpp: expected {tokens} tokens; got {answer}")


class Fork:
    """ik-llama-cpp-python, a fork with kernels of its own, which comes as wheels."""

    def __init__(self, path: str, threads: int) -> None:
        from ik_llama_cpp import IkLlama

        self.llama = IkLlama(path, n_ctx=MOST, n_threads=threads, n_seq_max=1, verbose=False)

    @staticmethod
    def name() -> str:
        from ik_llama_cpp import __version__

        return f"ik-llama-cpp-python {__version__}"

    def write(self, ids: list[int], tokens: int) -> None:
        written = self.llama.generate(ids, max_tokens=tokens, temperature=0.0)
        if len(written) != tokens:  # it can't be told to write on
            raise SystemExit(f"ik-llama-cpp-python: expected {tokens} tokens; got {len(written)}, then an end of text")


def installed() -> type | None:
    for kind in (Bindings, Server, Fork):
        try:
            kind.name()
        except ImportError:
            continue
        return kind
    return None


def main() -> None:
    kind = installed()
    if kind is None:
        raise SystemExit(3)
    path, tokens, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    llama = kind(path, threads)
    print(kind.name(), flush=True)
    for line in sys.stdin:
        start = time.process_time()
        if line.strip() == "load":
            llama = kind(path, threads)
        else:
            ids, _, n = line.strip().partition("] ")
            llama.write(json.loads(ids + "]" if n else ids), int(n or tokens))
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()
