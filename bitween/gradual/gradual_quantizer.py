"""GradualQuantizer: a memory target and a perplexity budget in, the best model that fits both out, with the proof."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from bitween._progress import Progress, no_progress, tell
from bitween._recording import outside_inference_mode
from bitween.export.targets import find_target
from bitween.gradual.decisions import BudgetConflict, descend, not_worse_than_uniform, proven
from bitween.gradual.descent import Descent, Stage
from bitween.gradual.importance_analyzer import ImportanceAnalyzer
from bitween.gradual.journal.journal import Journal, NullJournal, identity_of
from bitween.gradual.journal.recorded import PlanSteps, Recorder
from bitween.gradual.options import check_options
from bitween.gradual.plan.candidates import to_items
from bitween.gradual.plan.items import Plan
from bitween.gradual.plan.memory_need import MemoryNeed, need_within
from bitween.gradual.plan.planner import Frontier, frontier
from bitween.gradual.plan.sizes import Sizes
from bitween.gradual.precision_optimizer import PrecisionOptimizer, Realisation
from bitween.gradual.reporting import make_report
from bitween.gradual.scores.fisher import candidate_schemes, trellis_schemes, turned_schemes
from bitween.gradual.utils import budget_nats
from bitween.gradual.whole.run import WholeRun
from bitween.model import blocks
from bitween.model.attachments import check_attachments, check_own_weights
from bitween.model.causal import find_layout
from bitween.model.experts import shared_copy, unfolded
from bitween.model.layout import ModelLayout
from bitween.model.memory import MemoryAnalysis, analyze_memory, available_bytes
from bitween.model.patterns import checked_patterns
from bitween.model.spill import Spill, end_rest
from bitween.model.whole import WholeLayout, describe
from bitween.realise.context import RunContext, cut_text
from bitween.realise.routing import routing_changes
from bitween.report import story
from bitween.report.quantization_report import QuantizationReport
from bitween.scheme import Scheme
from bitween.store.opening import check_dtype, open_model
from bitween.store.writing import writable
from bitween.text import mix
from bitween.text.calibration import Splits
from bitween.text.examples import is_inputs

__all__ = ["BudgetConflict", "GradualQuantizer"]

PROBE_WINDOWS = 2  # of each importance trial: the ranking of blocks is for the report, the plan does not hang on it


class GradualQuantizer:
    """Quantizes a model gradually: a Hugging Face causal language model block by block; any other Hugging Face model
    or torch module on full passes through it, which is slower (`docs/tasks.md`).

    Parameters
    ----------
    model, tokenizer
        The model stays as it is; `quantize` returns a new one that shares its unquantized weights. A directory (or a
        name on the hub) in its place is opened without being read into memory whole; the tokenizer may then be None
    target_memory_reduction : share of the model's bytes to save, between 0 and 1
    max_perplexity_increase : relative, 0.05 = 5 %
    safety_multiplier : >= 1; how many budgets a stage may be predicted at and still be tried. Acceptance is
        never loosened.
    calibration_samples, evaluation_samples : windows of text for calibration and for the proof, at most; of several
        domains the proof takes 8 of each at least, as fewer bound nothing
    calibration_data : path, text, list of strings, (windows, length) token ids, name of a data set, or a data set,
        DataLoader, generator, encoded batches or chats (`bitween.text.sources.resolve`); or {name: any of these, or
        None for the shipped domain of that name}; default the text that comes with bitween, six domains. Of models of
        images, sounds and anything else examples of their inputs: a DataLoader, a data set, dicts or tensors
        (`bitween.text.examples`)
    domains : names of the domains of text that count, default all: windows are dealt out to them in equal shares, and
        the budget must hold in each; or {name: largest relative increase allowed there, None for
        `max_perplexity_increase`}
    ignore_layers : names or patterns (fnmatch) of layers to leave alone
    on_conflict : when both targets can't be met: "quality" returns the smallest model within the budget,
        "memory" the best one at the memory target, "error" raises BudgetConflict
    export_target : "any", "vllm", "marlin", "gguf", "exl3" or "auto-round": only schemes that this target runs are
        considered, and layers that it fuses share one
    max_damage : instead of perplexity, how far answers may move: nats of KL for distributions, elsewhere squared error
        of the outputs relative to their variance; a mean over examples
    metric, max_metric_drop : instead of both, a function of a model (more is better) and how far it may fall. It gives
        a number, or one for each of its examples: then half of them steer the search and the others prove the budget
    damage : "kl" or "error", how answers are compared; default by what the output is
    schemes : candidates, default 2 to 8 bits, groups of 32 to 128, symmetric and not
    trellis : consider trellis codes of 1.5 to 5 bits too: less damage at equal bytes, slower products, only in bitween
    method : quantizer of layers below 8 bits
    transforms : "auto" rotates and folds where the architecture allows it, "none" leaves the weights' basis alone
    distillation_steps : steps of training that bring row scales and norm gains of the chosen plan, and no codes, nearer
        to the original model; 0 for none. Costs no bytes; kept only where it lowers the damage
    importance : also measure the four importance methods on every block, for the report
    confidence : of the proof, one-sided
    certify : prove the budget on held-out text
    seed : of everything random; the same seed gives the same result
    max_memory : bytes that this process may take, about; where one pass over the text takes more, blocks work through
        it in batches, which is slower and rounds sums otherwise. ValueError where even that is more
    progress : called with (stage, done, total, message)
    journal : directory, optional
        Every finished step (scores, block, stage, decision) is on the disk at once, so that a run that was stopped goes
        on there and ends bit for bit as an uninterrupted one. Made when missing; yours to remove afterwards.
    resume : False starts over what the journal holds
    dtype, trust_remote_code : of a model given as a directory: "auto" (what its config says), "float32", "bfloat16" or
        "float16", or such a torch dtype; whether code that comes with it may run

    Raises
    ------
    TypeError, ValueError
        At once, before any work, naming the argument; InfeasibleTarget when no scheme reaches the memory target.
    """

    @outside_inference_mode
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        target_memory_reduction: float = 0.6,
        max_perplexity_increase: float = 0.05,
        safety_multiplier: float = 2.0,
        calibration_samples: int = 100,
        evaluation_samples: int = 200,
        calibration_data: Any = None,
        ignore_layers: Iterable[str] = (),
        on_conflict: str = "quality",
        export_target: str = "any",
        seed: int = 0,
        *,
        domains: Iterable[str] | Mapping[str, float | None] | None = None,
        max_damage: float | None = None,
        metric: Callable[[Any], Any] | None = None,
        max_metric_drop: float | None = None,
        damage: str | None = None,
        schemes: Sequence[Scheme] | None = None,
        trellis: bool = False,
        method: str = "gptq+refine",
        transforms: str = "auto",
        distillation_steps: int = 40,
        importance: bool = True,
        confidence: float = 0.95,
        certify: bool = True,
        sequence_length: int = 512,
        stages: int = 3,
        max_memory: int | None = None,
        progress: Progress = no_progress,
        journal: str | os.PathLike | None = None,
        resume: bool = True,
        dtype: Any = "auto",
        trust_remote_code: bool = False,
    ):
        checked = check_options(
            target_memory_reduction=target_memory_reduction,
            max_perplexity_increase=max_perplexity_increase,
            confidence=confidence,
            safety_multiplier=safety_multiplier,
            calibration_samples=calibration_samples,
            evaluation_samples=evaluation_samples,
            sequence_length=sequence_length,
            stages=stages,
            distillation_steps=distillation_steps,
            on_conflict=on_conflict,
            export_target=export_target,
            transforms=transforms,
            max_memory=max_memory,
            ignore_layers=ignore_layers,
            trellis=trellis,
            seed=seed,
            max_damage=max_damage,
            metric=metric,
            max_metric_drop=max_metric_drop,
            damage=damage,
        )
        self._spill = Spill()
        if isinstance(model, (str, os.PathLike)):
            options = {"trust": trust_remote_code, "keep": self._spill.keep, "done": self._spill.forget}
            model, tokenizer = open_model(model, dtype, tokenizer=tokenizer, **options)
            self._spill.adopt(model.parameters())
        elif check_dtype(dtype) != "auto":
            raise ValueError(f'dtype: expected "auto" for a model that is loaded already; got {dtype!r}')
        self.model, self.tokenizer = model, tokenizer
        self.target = find_target(checked.pop("export_target"))
        vars(self).update(checked)
        self.method, self.progress = method, progress
        self.journal, self.resume = journal, resume
        self.measure_importance, self.certify = importance, certify
        coded = turned_schemes() if self.target.turned else trellis_schemes() if self.trellis else ()
        if coded and not self.target.runs(coded[0]):
            raise ValueError(f"trellis: expected False for {export_target}, which can't run trellis codes; got True")
        self.schemes = tuple(s for s in (*(schemes or candidate_schemes()), *coded) if self.target.runs(s))
        self._coded = any(scheme.coding == "trellis" for scheme in self.schemes)
        if not self.schemes:
            raise ValueError(f"schemes: expected at least one that {export_target} runs; got none")
        check_own_weights(model)
        self.layout, reason = self._find_layout(calibration_data if domains is None else None)
        self.calibration_data = calibration_data
        if reason and domains is not None:
            raise ValueError(f"domains: expected None, as {reason}; got {domains!r}")
        self.text = mix.Mix({}) if reason else mix.checked(calibration_data, domains, tokenizer)
        if len(self.text.sources) == 1 and self.text.budgets:  # the only domain's budget is the run's
            self.max_perplexity_increase = next(iter(self.text.budgets.values()))
        self.ignore_layers = checked_patterns("ignore_layers", self.ignore_layers, self.layout)
        blocks.check_finite(model, self._spill.let_go)
        self.sizes = Sizes(
            model, self.layout, self.target, self.schemes, self.ignore_layers, self.target_memory_reduction
        )
        check_attachments(model, [x for x in self.layout.layers if not self.sizes.ignored(x)])
        self.sizes.check_reach()
        self._report: QuantizationReport | None = None
        self._seconds: dict[str, float] = {}
        self._whole: WholeRun | None = None
        if reason:
            self._whole = WholeRun(model, tokenizer, self.sizes, reason, self._options())
            _ = self._whole.budget  # what is wrong with examples or budget is told now
        else:
            self.memory_need = self._need()

    # ---- public ----------------------------------------------------------------------------------

    @outside_inference_mode
    def quantize(self) -> Any:
        """Quantize; returns the new model. The model given stays untouched, also when this fails.

        Raises
        ------
        JournalError, JournalMismatch
            The journal can't be used, or is of a run with other inputs; the message says what differs.
        RuntimeError
            The model to be delivered computes something else than the one that was measured.
        """
        if self._whole is not None:
            model = self._whole.quantize()
            self._report = model.bitween_report
            return model
        started = time.monotonic()
        self.memory_need.warn()
        self._tell(story.begin, self.layout, self.sizes, self.max_perplexity_increase, self.budget)
        text = self._timed("text", self._cut_text)  # first: what is wrong with it is known before any work
        self._tell(story.text, text)
        base, transforms = self._prepare()
        self._tell(story.transformed, transforms)
        context = self._context(base, text)
        with self._open_journal(context) as journal:
            recorder = Recorder(journal, context.layout)
            self._tell(story.analysis, len(self.schemes))
            scores, moment, importance = self._analyze(base, context, recorder)
            optimizer = PrecisionOptimizer(
                base,
                self.tokenizer,
                method=self.method,
                importance={} if moment is None else {context.layout.embedding.name: torch.from_numpy(moment)},
                calibration_windows=self.calibration_samples,
                one_pass=self.memory_need.one_pass,
                context=context,
                progress=self.progress,
            )
            front = frontier(self.sizes.plannable(to_items(scores), context))
            descent = Descent(
                front, self._realiser(optimizer, recorder), self.budget, self.safety_multiplier, budgets=self.budgets
            )
            rules = {"on_conflict": self.on_conflict, "budget": "perplexity budget"}
            words = f"perplexity budget of {self.max_perplexity_increase:.1%}"
            walk = partial(descend, descent, self.sizes, stages=self.stages, words=words, **rules)
            chosen, conflict = self._timed("descent", walk)
            chosen, uniform = self._timed("uniform check", lambda: not_worse_than_uniform(chosen, descent))
            chosen = self._timed("distillation", lambda: self._distilled(chosen, descent, optimizer, recorder))
            proof = None
            if self.certify:
                certify = partial(self._certify, optimizer=optimizer, recorder=recorder)
                prove = partial(proven, chosen, conflict, descent, certify, confidence=self.confidence, **rules)
                chosen, proof, conflict = self._timed("certificate", prove)
        optimizer.restore(chosen.realisation)
        changes = routing_changes(context, optimizer.runner, context.text.selection.ids)
        experts = sorted(optimizer.realiser.unreached), changes
        model = writable(optimizer.candidate.install(self.sizes.dtype, context.text.selection.ids[:1]))
        self._seconds["total"] = time.monotonic() - started
        self._report = make_report(
            self, model, chosen, descent, front, importance, context, transforms, conflict, uniform, proof, experts
        )
        model.bitween_report = self._report
        self._tell(story.delivered, self._report.memory, conflict)
        return model

    @outside_inference_mode
    def plan(self) -> tuple[Frontier, Plan]:
        """What `quantize` would begin with, predicted from curvature alone; no layer is quantized.

        Returns
        -------
        The frontier, which answers any other target of the same model at once (`within_bytes`, `within_damage`; its
        bytes are those of the layers), and the plan of least damage at the memory target.
        """
        if self._whole is not None:
            return self._whole.plan()
        text = self._timed("text", self._cut_text)
        base, _ = self._prepare()
        context = self._context(base, text)
        analyzer = ImportanceAnalyzer(
            base, self.tokenizer, probe_windows=PROBE_WINDOWS, context=context, progress=self.progress
        )
        self._timed("curvature", lambda: analyzer.analyze_curvature(blocked=self._coded))
        scores = self._timed("scores", lambda: analyzer.predict_damage(self.schemes))
        front = frontier(self.sizes.plannable(to_items(scores), context))
        return front, front.within_bytes(self.sizes.layer_limit)

    @property
    def budget(self) -> float:
        """ln(1 + max_perplexity_increase), nats per token; of another budget its limit."""
        if self._whole is not None:
            return self._whole.budget.limit
        return budget_nats(self.max_perplexity_increase)

    @property
    def budgets(self) -> dict[str, float]:
        """The same, of the domains that have a budget of their own."""
        return {name: budget_nats(increase) for name, increase in self.text.budgets.items()}

    def get_quantization_report(self) -> QuantizationReport:
        """The report of the last `quantize`."""
        if self._report is None:
            raise RuntimeError("get_quantization_report: expected quantize() to have been called")
        return self._report

    def get_memory_analysis(self) -> MemoryAnalysis:
        """Bytes by layer and block; before `quantize` those of the model as it is."""
        return self._report.memory if self._report else analyze_memory(self.model)

    def preflight(self) -> dict[str, Any]:
        """Sizes before anything is measured: bytes now, at the target, the least reachable; layers left alone; about
        the memory that `quantize` will need, what the system has, and the room for temporary files (TMPDIR)."""
        return {
            "bytes": self.sizes.original,
            "target_bytes": self.sizes.limit,
            "least_bytes": self.sizes.least,
            "fixed_bytes": self.sizes.fixed,
            "layers": len(self.layout.layers),
            "ignored_layers": [x.name for x in self.layout.layers if self.sizes.ignored(x)],
            "tied": any(x.kind == "embedding" and x.shared for x in self.layout.layers),
            "kept": [f"{kept.name}: {kept.reason}" for kept in self.layout.kept],
            "full_precision": self.sizes.full_precision(),
            "memory_needed": None if self._whole is not None else self.memory_need.total,
            "disk_needed": None if self._whole is not None else self.memory_need.disk,
            "memory_available": available_bytes(),
        }

    def _find_layout(self, calibration_data: Any) -> tuple[ModelLayout | WholeLayout, str]:
        """The model in blocks; as a whole, and why, where it can't be run so or what is asked needs whole passes."""
        copy = shared_copy(self.model)  # the user's own modules may run elsewhere meanwhile
        with suppress(Exception):  # stacks of experts are found by running token ids, which not every model takes
            copy = unfolded(copy)
        self._spill.rest_after(
            part for parts in copy.modules() if isinstance(parts, torch.nn.ModuleList) for part in parts
        )
        layout, reason = find_layout(copy)
        end_rest(copy)
        if layout is not None and is_inputs(calibration_data):
            reason = "calibration_data holds other inputs than text"
        elif layout is not None and (self.max_damage is not None or self.metric is not None or self.damage):
            reason = "the budget is not one of perplexity"
        return (describe(copy), reason) if reason else (layout, "")

    def _options(self) -> dict[str, Any]:
        names = ("target_memory_reduction", "max_perplexity_increase", "max_damage", "metric", "max_metric_drop")
        names += ("damage", "safety_multiplier", "calibration_samples", "evaluation_samples", "calibration_data")
        names += ("sequence_length", "stages", "on_conflict", "method", "confidence", "certify", "seed", "progress")
        return {name: getattr(self, name) for name in (*names, "journal", "resume", "ignore_layers", "schemes")}

    def _need(self) -> MemoryNeed:
        self._spill.let_go()  # opening and checking read the model
        return need_within(
            self.layout,
            copied=self.sizes.dtype != torch.float32 or self.transforms != "none",
            packed=(self.stages + 3) * self.sizes.limit,
            delivered=2 * self.sizes.limit,
            calibration=self.calibration_samples,
            evaluation=self.evaluation_samples,
            length=self.sequence_length,
            max_memory=self.max_memory,
        )

    # ---- before ----------------------------------------------------------------------------------

    def _context(self, base: Any, text: Splits) -> RunContext:
        return RunContext.build(
            base, self.tokenizer, text=text, seed=self.seed, progress=self.progress, spill=self._spill
        )

    def _prepare(self) -> tuple[Any, dict[str, Any]]:
        """A float32 copy to work on, in a basis that is easier to quantize where the architecture allows one."""
        base = shared_copy(unfolded(self.model))
        self._spill.rest_after(base.get_submodule(block.name) for block in self.layout.blocks)
        for parameter in base.parameters():  # tied weights stay tied: they are one parameter
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                parameter.data = self._spill.keep(parameter.data.float())
        if self.transforms == "none":
            return base, {"steps": [], "skipped": {}}
        from bitween.transforms import apply, plan_transforms

        layout = blocks.inspect(base)
        steps = ("scale",) if self.method in ("rtn", "clip") else ("rotate",)  # rotation needs error feedback to pay
        report = apply(base, layout, plan_transforms(base, layout, steps), seed=self.seed, keep=self._spill.keep)
        return base, {"steps": list(report.steps), "skipped": report.skipped, "logit_change": report.logit_change}

    def _cut_text(self) -> Splits:
        return cut_text(
            self.model,
            self.layout,
            self.tokenizer,
            calibration_data=self.text,
            calibration_samples=self.calibration_samples,
            evaluation_samples=self.evaluation_samples,
            length=self.sequence_length,
            seed=self.seed,
            bounded=self.certify,
        )

    def _open_journal(self, context: RunContext) -> NullJournal:
        if self.journal is None:
            return NullJournal()
        names = ("target_memory_reduction", "max_perplexity_increase", "safety_multiplier", "calibration_samples")
        names += ("evaluation_samples", "sequence_length", "stages", "on_conflict", "method", "transforms", "seed")
        names += ("distillation_steps", "measure_importance", "certify", "confidence", "ignore_layers", "schemes")
        options = {name: getattr(self, name) for name in names} | {
            "export_target": self.target.name,
            "one_pass": self.memory_need.one_pass,
            "domains": {name: self.text.budgets.get(name) for name in self.text.sources},
        }
        text = {split: getattr(context.text, split).ids for split in ("calibration", "selection", "certification")}
        return Journal.open(self.journal, identity_of(self.model, text, options), self.resume)

    def _analyze(self, base: Any, context: RunContext, recorder: Recorder) -> tuple[dict, Any, Any]:
        """Scores of every layer, the embedding's column weights, the importance report if wanted."""
        analyzer = ImportanceAnalyzer(
            base, self.tokenizer, probe_windows=PROBE_WINDOWS, context=context, progress=self.progress
        )

        def work() -> tuple[dict, Any]:
            curvature = self._timed("curvature", lambda: analyzer.analyze_curvature(blocked=self._coded))
            scores = self._timed("scores", lambda: analyzer.predict_damage(self.schemes))
            return scores, curvature[context.layout.embedding.name].moment

        scores, moment = recorder.scores(self.schemes, work)
        if not self.measure_importance:
            return scores, moment, None
        return scores, moment, self._timed("importance", lambda: recorder.importance(analyzer.analyze_block_importance))

    # ---- the descent -----------------------------------------------------------------------------

    def _realiser(self, optimizer: PrecisionOptimizer, recorder: Recorder):
        def realise(name: str, plan: Plan) -> Realisation:
            self._tell(story.attempt, name, plan.nbytes, plan.damage, self.budget)
            found = optimizer.realise(plan.schemes, stage=name, recorder=recorder)
            held = found.measurement.nats(self.budget, self.budgets) <= self.budget
            self._tell(story.result, found.measurement, self.max_perplexity_increase, held)
            recorder.decision(f"stage {name}", {"nbytes": plan.nbytes, "damage": str(found.measurement.damage)})
            return found

        return realise

    def _distilled(self, chosen: Stage, descent: Descent, optimizer: PrecisionOptimizer, recorder: Recorder) -> Stage:
        """The chosen stage with row scales and norm gains trained end to end, if that is nearer to the original."""
        if not self.distillation_steps:
            return chosen
        realisation = optimizer.distill(chosen.realisation, self.distillation_steps, recorder)
        stage = descent.add(f"{chosen.name}, distilled", realisation, chosen)
        better = stage.accepted >= chosen.accepted and stage.damage < chosen.damage
        self._tell(story.distilled, chosen.damage, stage.damage, better)
        return stage if better else chosen

    def _certify(self, stage: Stage, confidence: float, optimizer: PrecisionOptimizer, recorder: Recorder) -> Any:
        optimizer.restore(stage.realisation)
        self._tell(story.proving, stage.nbytes, len(optimizer.context.text.certification))
        proof = optimizer.evaluator.certify(
            optimizer.runner,
            self.max_perplexity_increase,
            confidence=confidence,
            budgets=self.text.budgets,
            keep=partial(_keep, recorder.plan(stage.realisation.plan), bool(stage.realisation.gains)),
        )
        self._tell(story.proof, proof)
        return proof

    # ---- after -----------------------------------------------------------------------------------

    def _tell(self, sentence: Any, *facts: Any) -> None:
        tell(self.progress, sentence(*facts))

    def _timed(self, name: str, work):
        started = time.monotonic()
        try:
            return work()
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started


def _keep(steps: PlanSteps, distilled: bool, name: str, work: Any) -> Any:
    return steps.array(f"distilled, {name}" if distilled else name, work)
