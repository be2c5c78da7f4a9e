"""Progress bars: one per stage, with elapsed and remaining time; in notebooks the notebook's own bar."""

from __future__ import annotations

__all__ = ["ProgressBars", "Story"]


class ProgressBars:
    """A `progress` callback that draws one tqdm bar per stage.

    Called with (stage, done, total, message); a new stage, or one that starts again, opens a new bar. Bars go to
    standard error, so that what a program prints stays clean.
    """

    def __init__(self) -> None:
        self._bar = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int, message: str) -> None:
        from tqdm.auto import tqdm

        if self._bar is None or stage != self._stage or done < self._bar.n:
            self.close()
            self._bar, self._stage = tqdm(total=total, desc=stage, leave=True, dynamic_ncols=True), stage
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
    """Bars that vanish when their stage is done."""
