"""Writes docs/options.md from the command line itself: python docs/make_options.py"""

from pathlib import Path

import typer

from bitween.cli import app

PAGE = Path(__file__).with_name("options.md")
HEAD = """# Every option

Written by `docs/make_options.py` from the command line itself. The same options stand in a TOML file (`--config`,
`examples/quantize.toml`) under their long names with `_` for `-`, and in Python as keywords of `GradualQuantizer`,
whose docstring tells what else it takes.

Exit status: 0 done; 1 refused or failed, with one line that says why; 2 a command line that cannot be read; 130 stopped
by Ctrl-C, with how to go on.

| environment | meaning |
|---|---|
| `BITWEEN_ISA` | instruction set: scalar, avx2, avx512, neon; default the best that the CPU has |
| `BITWEEN_NUM_THREADS` | threads, 1 to 1024; default those of `torch.get_num_threads()` |
| `BITWEEN_BLAS` | when building: "system" or the path of an OpenBLAS; default that of scipy-openblas32, copied |
"""


def page() -> str:
    """The whole text."""
    parts = [HEAD]
    for name, command in typer.main.get_command(app).commands.items():
        lines = ["| option | meaning | default |", "|---|---|---|"]
        for option in command.params:
            if option.name == "help":
                continue
            text = (getattr(option, "help", None) or "").replace("|", "\\|")
            if option.param_type_name == "argument":
                lines.append(f"| `{option.name.upper()}` | {text} | required |")
                continue
            plain = option.default in (None, False, ()) or callable(option.default)
            default = "required" if option.required else "" if plain and option.default != 0 else str(option.default)
            default = "" if option.default is False else "yes" if option.default is True else default
            lines.append(f"| {', '.join(f'`{o}`' for o in option.opts + option.secondary_opts)} | {text} | {default} |")
        first = command.help.strip().splitlines()[0]
        parts.append(f"## bitween {name}\n\n{first}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
