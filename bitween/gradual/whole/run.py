"""WholeRun: a gradual run over a module that can't be run block by block. `GradualQuantizer` conducts it where it must.

The same steps as for a causal language model: curvature, scores, a frontier of plans, stages down it, each realised and
measured, and a proof on examples held out from all of them. Every pass goes through the whole module.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from bitween._progress import tell
from bitween.gradual.budget import Budget, choose_budget
from bitween.gradual.decisions import descend, not_worse_than_uniform, proven
from bitween.gradual.descent import Descent, Stage
from bitween.gradual.journal.journal import Journal, NullJournal, identity_of
from bitween.gradual.journal.recorded import PlanSteps, Recorder
from bitween.gradual.plan.candidates import to_items
from bitween.gradual.plan.items import Plan
from bitween.gradual.plan.planner import Frontier, frontier
from bitween.gradual.plan.sizes import Sizes
from bitween.gradual.precision_optimizer import Realisation
from bitween.gradual.scores.fisher import score_layer
from bitween.gradual.whole.curvature import collect_whole_curvature
from bitween.gradual.whole.evaluator import WholeEvaluator, WholeMeasurement
from bitween.model.memory import analyze_memory, return_freed_memory
from bitween.realise.whole_context import WholeContext, float32_copy
from bitween.realise.whole_examples import find_examples
from bitween.realise.whole_model import WholeRealiser, check_method
from bitween.report import story
from bitween.report.quantization_report import QuantizationReport
from bitween.store.writing import writable

__all__ = ["WholeRun"]


class WholeRun:
    """One run.

    Parameters
    ----------
    model : any module; stays as it is
    sizes : of its matrices
    reason : why it runs as a whole
    options : of `GradualQuantizer`, by name
    """

    def __init__(self, model: nn.Module, tokenizer: Any, sizes: Sizes, reason: str, options: dict[str, Any]):
        self.model, self.tokenizer, self.sizes, self.reason, self.options = model, tokenizer, sizes, reason, options
        check_method(options["method"])
        self.seconds: dict[str, float] = {}
        self._context: WholeContext | None = None
        self._budget: Budget | None = None

    # ---- before ----------------------------------------------------------------------------------

    @property
    def context(self) -> WholeContext:
        """The module in float32 and its examples; everything that is wrong with them is told here, before any work."""
        if self._context is None:
            self._context = self._timed("examples", self._open)
        return self._context

    @property
    def budget(self) -> Budget:
        """What the model may cost."""
        if self._budget is None:
            o = self.options
            names = ("max_perplexity_increase", "max_damage", "metric", "max_metric_drop")
            self._budget = choose_budget(
                **{name: o[name] for name in names},
                damage=self.context.kind,
                has_perplexity=self.context.has_labels,
                task=type(self.model).__name__,
            )
        return self._budget

    def _open(self) -> WholeContext:
        o = self.options
        base = float32_copy(self.model)
        sizes = {name: o[name] for name in ("calibration_samples", "evaluation_samples")}
        examples, causal = find_examples(
            base, self.tokenizer, o["calibration_data"], **sizes, length=o["sequence_length"], seed=o["seed"]
        )
        return WholeContext.build(
            base, examples, kind=o["damage"], shifted=causal, seed=o["seed"], progress=o["progress"]
        )

    # ---- the run ---------------------------------------------------------------------------------

    def quantize(self) -> nn.Module:
        """The new module; its report is `bitween_report`."""
        started = time.monotonic()
        context, budget, o = self.context, self.budget, self.options
        evaluator = WholeEvaluator(context, budget)
        self._tell(story.begin_whole, context.layout, self.sizes, budget, self.reason)
        self._tell(story.examples, context.examples)
        with self._open_journal() as journal:
            recorder = Recorder(journal, context.layout)
            self._tell(story.analysis, len(self.sizes.schemes))
            scores, columns = self._analyze(recorder)
            realiser = WholeRealiser(context, method=o["method"], importance=columns, progress=o["progress"])
            front = frontier(self.sizes.plannable(to_items(scores)))
            realise = partial(self._realise, realiser, evaluator, recorder)
            ratios = (0.2, 2.0) if budget.kind == "perplexity" else (1e-6, 1e6)
            descent = Descent(front, realise, budget.limit, o["safety_multiplier"], ratios)
            rules = {"on_conflict": o["on_conflict"], "budget": f"{budget.kind} budget"}
            walk = partial(descend, descent, self.sizes, stages=o["stages"], words=f"budget of {budget}", **rules)
            chosen, conflict = self._timed("descent", walk)
            chosen, uniform = self._timed("uniform check", lambda: not_worse_than_uniform(chosen, descent))
            proof = None
            if o["certify"] and evaluator.proves:
                certify = partial(self._certify, realiser=realiser, evaluator=evaluator, recorder=recorder)
                prove = partial(proven, chosen, conflict, descent, certify, confidence=o["confidence"], **rules)
                chosen, proof, conflict = self._timed("certificate", prove)
        self._restore(realiser, chosen.realisation)
        model = writable(realiser.candidate.deliver(self.model, context.examples.selection[0]))
        self.seconds["total"] = time.monotonic() - started
        report = self._report(model, chosen, descent, front, conflict, uniform, proof, realiser)
        model.bitween_report = report
        self._tell(story.delivered, report.memory, conflict)
        return model

    def plan(self) -> tuple[Frontier, Plan]:
        """What `quantize` would begin with, predicted from curvature alone."""
        scores, _ = self._analyze(Recorder(NullJournal(), self.context.layout))
        front = frontier(self.sizes.plannable(to_items(scores)))
        return front, front.within_bytes(self.sizes.layer_limit)

    def _analyze(self, recorder: Recorder) -> tuple[dict, dict[str, np.ndarray]]:
        """Scores of every layer, and the column weights of lookup tables."""
        context, schemes = self.context, self.sizes.schemes
        feedback = self.options["method"] not in ("rtn", "clip")
        ranges = "minmax" if self.options["method"] == "rtn" else "clip"
        columns: dict[str, np.ndarray] = {}

        def work() -> tuple[dict, None]:
            curvature = self._timed(
                "curvature", lambda: collect_whole_curvature(context, progress=self.options["progress"])
            )
            for layer in context.layout.layers:
                if layer.kind == "embedding" and curvature[layer.name][0].moment is not None:
                    columns[layer.name] = np.asarray(curvature[layer.name][0].moment, np.float32)
            how = {"feedback": feedback, "ranges": ranges}
            layers = context.layout.layers

            def score() -> dict:
                return {x.name: score_layer(x, curvature[x.name], schemes, **how) for x in layers}

            return self._timed("scores", score), None

        scores, _ = recorder.scores(schemes, work)
        columns = recorder.plan({}).arrays("column weights", lambda: columns)
        return scores, {name: values for name, values in columns.items() if values.any()}

    def _open_journal(self) -> NullJournal:
        o = self.options
        if o["journal"] is None:
            return NullJournal()
        skipped = ("journal", "resume", "progress", "metric", "calibration_data", "max_memory", "target")
        options = {name: value for name, value in o.items() if name not in skipped}
        options["metric"] = getattr(o["metric"], "__qualname__", None)
        options["export_target"] = self.sizes.target.name
        examples = self.context.examples
        parts = ("calibration", "selection", "certification")
        inputs = {part: [_plain(example) for example in getattr(examples, part)] for part in parts}
        return Journal.open(o["journal"], identity_of(self.model, inputs, options), o["resume"])

    # ---- stages ----------------------------------------------------------------------------------

    def _realise(
        self, realiser: WholeRealiser, evaluator: WholeEvaluator, recorder: Recorder, name: str, plan: Plan
    ) -> Realisation:
        started = time.monotonic()
        self._tell(story.attempt_whole, name, plan.nbytes, plan.damage, evaluator.budget)
        steps = recorder.plan(plan.schemes)
        stored = steps.part("whole")
        if stored is None:
            stored = realiser.realise(plan.schemes, stage=name)
            steps.put_part("whole", stored)
        else:
            self._put(realiser, stored)
        measurement = _measured(steps, lambda: evaluator.measure(realiser.candidate.model))
        return_freed_memory()
        own = self.sizes.layout  # in the user's own dtype
        nbytes = sum(stored[x.name].nbytes if x.name in stored else x.nbytes for x in own.layers)
        self._tell(story.result_whole, measurement, evaluator.budget)
        return Realisation(dict(plan.schemes), stored, nbytes, time.monotonic() - started, measurement)

    def _put(self, realiser: WholeRealiser, stored: dict) -> None:
        realiser.candidate.restore_all()
        for name, tensor in stored.items():
            realiser.candidate.put(self.context.layout.layer(name), tensor)

    def _restore(self, realiser: WholeRealiser, realisation: Realisation) -> None:
        """Put the candidate back into the state that a realisation left, bit for bit."""
        self._put(realiser, realisation.stored)

    def _certify(
        self, stage: Stage, confidence: float, *, realiser: WholeRealiser, evaluator: WholeEvaluator, recorder: Recorder
    ) -> Any:
        self._restore(realiser, stage.realisation)
        self._tell(story.proving_whole, stage.nbytes, len(self.context.examples.certification))
        steps = recorder.plan(stage.realisation.plan)
        proof = evaluator.certify(realiser.candidate.model, confidence=confidence, keep=steps.array)
        self._tell(story.proof, proof)
        return proof

    # ---- after -----------------------------------------------------------------------------------

    def _report(
        self, model, chosen: Stage, descent: Descent, front: Frontier, conflict, uniform, proof, realiser: WholeRealiser
    ) -> QuantizationReport:
        o, layers, budget = self.options, self.context.layout.layers, self.budget
        way = "runs as a whole" if realiser.waits is not False else "runs as a whole, once a layer"
        targets = {
            "memory_reduction": o["target_memory_reduction"],
            "budget": {"kind": budget.kind, "limit": budget.limit, "unit": budget.unit, "text": str(budget)},
            "confidence": o["confidence"],
            "on_conflict": o["on_conflict"],
            "export_target": self.sizes.target.name,
            "method": o["method"],
            "seed": o["seed"],
            "average_bits": 8 * chosen.nbytes / sum(x.shape[0] * x.shape[1] for x in layers),
            "way": f"{way}, since {self.reason}",
        }
        near = None
        if conflict:
            points = [{"nbytes": s.nbytes, "damage": s.damage, "increase": s.increase} for s in descent.stages]
            near = {"text": conflict, "measured": points}
        plan = chosen.realisation.plan
        return QuantizationReport(
            targets=targets,
            memory=analyze_memory(model, self.model),
            quality=chosen.realisation.measurement.to_dict() | {"text": budget.said(chosen.increase)},
            certificate=None if proof is None else {**proof.to_dict(), "text_line": str(proof)},
            plan={x.name: str(plan.get(x.name) or "kept") for x in layers},
            stages=[
                {**stage.to_dict(), "text": budget.said(stage.increase), "delivered": stage is chosen}
                for stage in descent.stages
            ],
            frontier=front.points(200),
            importance=None,
            text=self.context.examples.report,
            transforms={"steps": [], "skipped": {"all": "the model runs as a whole"}},
            conflict=near,
            uniform=uniform,
            seconds=dict(self.seconds),
            unreached_experts=sorted(realiser.unreached),
            full_precision=self.sizes.full_precision(),
        )

    def _tell(self, sentence: Callable, *facts: Any) -> None:
        tell(self.options["progress"], sentence(*facts))

    def _timed(self, name: str, work: Callable) -> Any:
        started = time.monotonic()
        try:
            return work()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


def _measured(steps: PlanSteps, work: Callable[[], WholeMeasurement]) -> WholeMeasurement:
    values = steps.array("measured", lambda: np.array(astuple(work()), np.float64)).tolist()
    return WholeMeasurement(*values[:-1], tokens=int(values[-1]))


def _plain(example: Any) -> dict[str, Any]:
    """An example by name, for a journal: what can't be told apart from another there is written down."""
    return {n: x if hasattr(x, "dtype") or x is None else repr(x) for n, x in example.inputs.items()}
