"""The expensive steps of a run as journal entries and back: what a journal already holds is not computed again.

Every step goes through one method here: it looks into the journal, else does the work and puts the result there.
Numbers keep all their bits (arrays are stored as they are), so a resumed run decides as an uninterrupted one does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bitween.gradual.importance_analyzer import ImportanceReport
from bitween.gradual.journal.journal import NullJournal
from bitween.gradual.measurement import Measurement
from bitween.gradual.scores.fisher import LayerScores
from bitween.model import blocks
from bitween.quantized_tensor import QuantizedTensor
from bitween.scheme import Scheme

__all__ = ["PlanSteps", "Recorder"]


class Recorder:
    """Steps of one run in one journal.

    Parameters
    ----------
    journal : NullJournal or Journal
    layout : of the model under quantization
    """

    def __init__(self, journal: NullJournal, layout: blocks.ModelLayout):
        self.journal = journal
        self._layers = {layer.name: layer for layer in layout.layers}

    # ---- analysis --------------------------------------------------------------------------------

    def scores(
        self, schemes: tuple[Scheme, ...], work: Callable[[], tuple[dict[str, LayerScores], np.ndarray | None]]
    ) -> tuple[dict[str, LayerScores], np.ndarray | None]:
        """Predicted damage of every layer, and the column weights of the embedding, or None."""
        record, arrays = self._find("scores")
        if record is None:
            found, moment = work()
            arrays = {
                "damage": np.stack([score.damage for score in found.values()]),
                "relative_error": np.array([score.relative_error for score in found.values()]),
            }
            if moment is not None:
                arrays["moment"] = np.asarray(moment, np.float32)
            record = self.journal.put("scores", {"layers": list(found)}, arrays)
        scores = {}
        for name, damage, error in zip(record["layers"], arrays["damage"], arrays["relative_error"], strict=True):
            layer = self._layers[name]
            sizes = np.array([scheme.nbytes(*layer.shape) for scheme in schemes], np.int64)
            scores[name] = LayerScores(name, schemes, damage, float(error), sizes, layer.nbytes)
        return scores, arrays.get("moment")

    def importance(self, work: Callable[[], ImportanceReport]) -> ImportanceReport:
        """Importance of every block by the measured methods."""
        record, arrays = self._find("importance")
        if record is None:
            report = work()
            units = list(report.combined)
            arrays = {f"damage {m}": np.array([d[u] for u in units]) for m, d in report.damage.items()}
            arrays["combined"] = np.array([report.combined[u] for u in units])
            arrays["agreement"] = np.array(list(report.agreement.values()), np.float64)
            pairs = [list(pair) for pair in report.agreement]
            self.journal.put("importance", {"units": units, "weights": report.weights, "pairs": pairs}, arrays)
            return report

        def by_unit(values):
            return dict(zip(record["units"], values.tolist(), strict=True))

        damage = {m: by_unit(arrays[f"damage {m}"]) for m in record["weights"] if f"damage {m}" in arrays}
        agreement = {tuple(p): v for p, v in zip(record["pairs"], arrays["agreement"].tolist(), strict=True)}
        return ImportanceReport(damage, by_unit(arrays["combined"]), record["weights"], agreement)

    # ---- plans -----------------------------------------------------------------------------------

    def plan(self, schemes: Mapping[str, Scheme | None]) -> PlanSteps:
        """The steps of realising one plan."""
        text = "\n".join(f"{name}: {scheme}" for name, scheme in sorted(schemes.items()))
        return PlanSteps(self, schemes, hashlib.sha256(text.encode()).hexdigest()[:16])

    def decision(self, key: str, record: dict[str, Any]) -> None:
        """Keep what was decided, for people; nothing is read back."""
        if self.journal.get(key) is None:
            self.journal.put(key, record)

    def _find(self, key: str) -> tuple[dict | None, dict[str, np.ndarray]]:
        record = self.journal.get(key)
        return record, {} if record is None else self.journal.arrays(key) or {}


class PlanSteps:
    """Blocks, the rest, the measurement and the proof of one plan."""

    def __init__(self, recorder: Recorder, schemes: Mapping[str, Scheme | None], digest: str):
        self._recorder, self._schemes, self._key = recorder, schemes, f"plan {digest}"

    def part(self, name: str) -> dict[str, QuantizedTensor] | None:
        """Layers of a part ("block 3", "rest") that an earlier run finished, or None."""
        record, arrays = self._recorder._find(f"{self._key}: {name}")
        if record is None:
            return None
        found = {}
        for layer in record["layers"]:
            codes, scales, zeros = (arrays.get(f"{layer}.{kind}") for kind in ("codes", "scales", "zeros"))
            shape = tuple(self._recorder._layers[layer].shape)
            found[layer] = QuantizedTensor(codes, scales, zeros, self._schemes[layer], shape)
        return found

    def put_part(self, name: str, stored: Mapping[str, QuantizedTensor]) -> None:
        """Keep the layers of a part."""
        arrays = {}
        for layer, tensor in stored.items():
            arrays[f"{layer}.codes"], arrays[f"{layer}.scales"] = np.asarray(tensor.codes), np.asarray(tensor.scales)
            if tensor.zeros is not None:
                arrays[f"{layer}.zeros"] = np.asarray(tensor.zeros)
        self._recorder.journal.put(f"{self._key}: {name}", {"layers": list(stored)}, arrays or None)

    def measurement(self, work: Callable[[], Measurement], name: str = "measured") -> Measurement:
        """How the plan as a whole did on the selection text."""
        return Measurement.from_arrays(self.arrays(name, lambda: work().to_arrays()))

    def array(self, name: str, work: Callable[[], np.ndarray]) -> np.ndarray:
        """One array of numbers that belongs to the plan."""
        return self.arrays(name, lambda: {"values": work()})["values"]

    def arrays(self, name: str, work: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays that belong to the plan, by name."""
        record, arrays = self._recorder._find(f"{self._key}: {name}")
        if record is None:
            arrays = {key: np.ascontiguousarray(values) for key, values in work().items()}
            self._recorder.journal.put(f"{self._key}: {name}", {}, arrays)
        return arrays
