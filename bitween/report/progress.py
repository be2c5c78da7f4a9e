"""Progress bars: one per stage, with elapsed and remaining time; in notebooks the notebook's own bar."""

from __future__ import annotations

import sys
import textwrap
import time

__all__ = ["ProgressBars", "Story"]


class ProgressBars:
    """A `progress` callback that draws one tqdm bar per stage.

    Called with (stage, done, total, message); a new stage, or one that starts again, opens a new bar. Bars go to
    standard error, so that what a program prints stays clean.
    """

    def __init__(self, *, leave: bool = True) -> None:
        self._bar, self._leave = None, leave
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int, message: str) -> None:
        from tqdm.auto import tqdm

        if self._bar is None or stage != self._stage or done < self._bar.n:
            self.close()
            self._bar, self._stage = tqdm(total=total, desc=stage, leave=self._leave, dynamic_ncols=True), stage
        self._bar.total = total
        self._bar.set_postfix_str(message[-60:], refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Finish the open bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Story(ProgressBars):
    """The same, for a run that should read like a story: sentences stay, bars vanish when their stage is done.

    Quantizers call `tell` with what they are about to try and why, and with what came of it.
    """

    def __init__(self) -> None:
        super().__init__(leave=False)
        self._started = time.monotonic()

    def tell(self, sentence: str) -> None:
        """One sentence, under the seconds since the start, on standard error."""
        self.close()
        seconds = int(time.monotonic() - self._started)
        head = f"{seconds // 60:3d}:{seconds % 60:02d}  "
        lines = textwrap.wrap(sentence, 110, initial_indent=head, subsequent_indent=" " * len(head))
        print("\n".join(lines), file=sys.stderr, flush=True)
