"""llama.cpp writing tokens on command, for generate.py, in whatever Python has llama-cpp-python.

    python benchmarks/llama_generate.py FILE.gguf PROMPT TOKENS THREADS

For each line on standard input it writes TOKENS tokens, then answers with a line. Exit status 3: not installed. Needs
nothing of bitween.
"""

import sys


def main() -> None:
    try:
        from llama_cpp import Llama, __version__
    except ImportError:
        raise SystemExit(3) from None
    path, prompt, tokens, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    llama = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = llama.tokenize(prompt.encode())
    print(__version__, flush=True)
    for _ in sys.stdin:
        llama.reset()
        for i, _ in enumerate(llama.generate(ids, temp=0.0), start=1):
            if i == tokens:  # not llama(...), which stops at the end of the text
                break
        print("done", flush=True)


if __name__ == "__main__":
    main()
