"""``ffnkit inspect`` and ``compress``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ffnkit.cli import console, describe, forms, options, streams, targets
from ffnkit.cli.after import After, show_cost
from ffnkit.cli.application import app
from ffnkit.cli.budgets import Budget
from ffnkit.cli.calibration import Calibration
from ffnkit.cli.data_options import DATA, CalibrationData
from ffnkit.cli.deciding import Deciding, spread_lines
from ffnkit.cli.expecting import expecting
from ffnkit.cli.forms import Form
from ffnkit.cli.history import History
from ffnkit.cli.outputs import check_output, check_output_file
from ffnkit.errors import FfnkitError
from ffnkit.io.folders import check_target, staging
from ffnkit.io.placing import mapped, moved

PANEL = "Models"


@app.command(rich_help_panel=PANEL)
def inspect(model: options.Model, as_json: options.Json = False) -> None:
    """Print every FFN of a model: name, shape, share of the parameters, FLOPs. Reads no weights of a plain model.

    [bold]Examples[/bold]

      ffnkit inspect roberta-base

      ffnkit inspect ./my-model [cyan]--json[/cyan] | jq .ffn_share
    """
    import ffnkit
    from ffnkit.io.architectures import empty_model

    console.quieten()
    inventory = ffnkit.inspect(empty_model(model))
    if as_json:
        console.print_json(inventory.to_dict())
    else:
        console.out(str(inventory))


@app.command(rich_help_panel=PANEL)
@options.grouped
def compress(
    model: options.Model,
    *,
    method: Annotated[str | None, typer.Option("--method", "-m", help="One of 'ffnkit methods'.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="NAME=VALUE", help="A setting of the method; repeatable.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", "-l", help="all, last:8, 4-11, 4,5,9; 'encoder:last:4' in two stacks.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the method. \\[default: 0]")] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Share (or number) of FFN parameters left; sets widths by layer.")
    ] = None,
    multiple: Annotated[
        int | None, typer.Option("--multiple", min=1, help="With --budget, --target: a width's unit. \\[64 or 8]")
    ] = None,
    targeted: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="KIND=AMOUNT", help="params, flops, bytes, kv or latency that stay."),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="With --target kv: tokens of a sequence. \\[4096]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write. Whole or not there: never half.")
    ] = None,
    data: CalibrationData,
    statistics: Annotated[
        Path | None,
        typer.Option("--statistics", help="A file of 'ffnkit calibrate', in the place of data.", rich_help_panel=DATA),
    ] = None,
    deciding: Deciding,
    after: After,
    form: Annotated[
        Form,
        typer.Option("--form", help=forms.HELP),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; write no model.")] = False,
    plan_in: Annotated[Path | None, typer.Option("--plan", help="Apply this saved plan instead of a method.")] = None,
    plan_out: Annotated[Path | None, typer.Option("--plan-out", help="Save the plan here.")] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    stream: streams.Stream = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Make the FFNs of a model smaller: plan, print the plan, apply it, save.

    [bold]Examples[/bold]

      ffnkit compress roberta-base --method fusion [cyan]--set width=0.25 --layers last:8 --dry-run[/cyan]

      ffnkit compress roberta-base --method fusion --set width=0.25 --layers last:8 [cyan]--out small[/cyan]

      ffnkit compress roberta-base --method calibrated-fusion --set width=0.25 [cyan]--text notes.txt[/cyan] --out small

      ffnkit compress ./llama --method fusion --set width=2048 [cyan]--form standard[/cyan] --out small

      ffnkit compress roberta-base [cyan]--budget 0.5[/cyan] --text notes.txt --out small

      ffnkit compress ./llama [cyan]--target params=0.8[/cyan] --text notes.txt --out small

    With --task or --text, calibrated-fusion is the method unless another is named: it measures activations on a few
    thousand tokens and keeps far more of the model than methods that see the weights only. Beside --text, half of them
    are text of many kinds that comes with ffnkit (--mix), since what is fitted to one kind of text loses on others;
    where no data are named, all of them are.

    A width such as 0.25 is a share of the neurons, a whole number counts them. --budget gives each layer a width of its
    own, so that together they keep that share of the FFN parameters; equal ones with --form standard. --target is
    of the whole model: neurons, heads, FFNs, attentions, layers and sharing compete for it.

    What it cost is measured on text that no fit sees, before and after (--cost-tokens). --heal 200k lets the compressed
    model learn from the uncompressed one on so many tokens; what does not gain on held-out text is not kept.

    Tune the result: ffnkit tune small ...
    """
    target = targets.only(targeted)
    if out is None and not dry_run:
        raise FfnkitError("ffnkit compress", "neither --out nor --dry-run is given", "Add --out DIR to save the result")
    options.check_dtype(dtype)
    if out is not None:
        check_output(out, overwrite=overwrite, source=model)
        for part in ("compact", "standard") if form == "both" else ():
            check_target(out / part)
    calibration = Calibration(**vars(data), seed=seed or 0, statistics=statistics)
    given_method = method
    if method is None and plan_in is None and calibration.given:
        method = "calibrated-fusion"
    limit = Budget.read(budget, multiple if target is None else None, form, settings or [])
    named = "--budget" if limit is not None else "--target" if target is not None else None
    if named is not None and plan_in is not None:
        raise FfnkitError(f"--plan {plan_in}", f"{named} is given too", "Leave it out: the plan holds the decisions")
    if target is not None and limit is not None:
        raise FfnkitError(f"--target {target}", "--budget is given too", "Give one of the two")
    if target is not None:
        chosen = targets.fitting(target, context, given_method, settings or [], layers, multiple, form)
    else:
        pairs = [*(settings or []), *(limit.settings(method) if limit is not None else [])]
        chosen = choose_method(method, pairs, layers, seed, plan_in)
    calibration.check(chosen, limit, read=not dry_run and after.reads)
    deciding.check(chosen, calibration)
    console.quieten()
    if plan_out is not None:
        from ffnkit.plans import is_plan

        read = [plan_in, statistics, after.cost_text, *calibration.texts]
        check_output_file("--plan-out", plan_out, "saved plan", is_plan, read)
    after.check(dry_run, chosen, calibration)
    if statistics is not None and getattr(chosen, "sequential", False) is None:
        console.say("statistics are of the model as it was: each layer is fitted on its own (sequential=false)")
    if device_map is not None and stream:
        raise FfnkitError(f"--device-map {device_map}", "--stream keeps the model in its files", "Give one of the two")
    streamed = False if device_map is not None else stream
    with (
        mapped(device_map, beside=device),
        streams.around(streamed, model, None if dry_run else out, dtype, device, heal=after.heal) as place,
    ):
        job = Compression(model, chosen, plan_in, dtype, place, calibration, limit, deciding, after)
        report = job.run(plan_out, None if dry_run else out, form, as_json)
    if as_json:
        console.print_json(report)


def choose_method(
    name: str | None, pairs: list[str], layers: str | None, seed: int | None, plan_in: Path | None
) -> Any | None:
    """The method that the options ask for; None when a saved plan takes its place.

    Raises:
        FfnkitError: no method, an unknown one, settings that it does not have or refuses.
    """
    if plan_in is not None:
        if name is not None or pairs or layers is not None or seed is not None:
            do = "Leave out --method, --set, --layers and --seed: the plan holds the decisions"
            raise FfnkitError(f"--plan {plan_in}", "a method or its settings are given too", do)
        if not plan_in.is_file():
            raise FfnkitError(f"--plan {plan_in}", "there is no such file", "Make one with --plan-out")
        return None
    from ffnkit import methods

    names = ", ".join(methods.compressing())
    if name is None:
        raise FfnkitError("ffnkit compress", "no --method is given", f"Choose among {names}")
    if name not in methods.names():
        raise FfnkitError(f"--method {name}", "no such method", f"Choose among {names}")
    methods.check_compresses(name)
    settings = describe.parse_settings(pairs)
    for key, value in (("layers", layers), ("seed", seed)):
        if value is not None and key in settings:
            raise FfnkitError(f"--{key} {value}", f"--set {key}=... is given too", "Give one of the two")
        if value is not None:
            settings[key] = value
    return describe.build(methods.get(name), settings, f"method {name}")


class Compression:
    """One run of ``ffnkit compress``.

    Args:
        source: the model's name or folder.
        method, plan_in: what to do: a method, or a saved plan where there is no method.
        dtype, device: as given on the command line.
        budget: chooses the method's widths, where it is given.
        deciding: decides settings, and tells how draws of the data differ.
        after: what is measured around it, and how the model is healed.
    """

    def __init__(
        self,
        source: str,
        method: Any | None,
        plan_in: Path | None,
        dtype: str,
        device: str,
        calibration: Calibration | None = None,
        budget: Budget | None = None,
        deciding: Deciding | None = None,
        after: After | None = None,
    ) -> None:
        self.source, self.method, self.plan_in, self.after = source, method, plan_in, after
        self.dtype, self.device, self.calibration, self.budget = dtype, device, calibration, budget
        self.deciding = deciding or Deciding()
        self.told: dict[str, Any] = {}  # what --json prints of the planning

    def run(self, plan_out: Path | None, out: Path | None, form: Form, as_json: bool) -> dict[str, Any]:
        """Plan, show, apply and save; without ``out`` nothing is applied. Returns what --json prints."""
        import ffnkit
        from ffnkit.checkpoint.adapters import is_adapted
        from ffnkit.io.architectures import empty_model, load_any

        place = options.pick_device(self.device)
        told = False
        if self.after is not None and self.after.heal is not None and self.calibration is not None:
            self.calibration.check_reads(empty_model(self.source), f"--heal {self.after.heal}: it learns from data")
        if self.method is not None:
            empty = empty_model(self.source)
            # layers and widths that do not fit, before weights are read
            told = self.budget is None and forms.warn_early(empty, self.method.chosen(empty))
            if self.calibration is not None:
                self.calibration.check_model(empty, self.method)
            if self.budget is not None:
                self.budget.check(empty, self.method)
        console.say(f"loading {self.source}")
        model = moved(load_any(self.source, dtype=self.dtype), place)
        adapted = is_adapted(model)
        if form == "apart" and not adapted:
            asked, what = "--form apart", f"no updates lie beside the weights of {self.source}"
            raise FfnkitError(asked, what, "Take compact or standard; ffnkit tune --form apart keeps updates apart")
        if adapted and form != "apart":
            console.say("updates are merged into the weights, and fill what is zero; --form apart keeps them beside it")
        report: dict[str, Any] = {"model": self.source, "before": totals(ffnkit.inspect(model))}
        plan, widths = self.make_plan(model)
        if not as_json:
            console.out(str(plan) if widths is None else f"{widths}\n{plan}")
            for line in (*searched(plan.report), *targets.told(plan.report), *spread_lines(self.told)):
                console.out(line)
        if plan_out is not None:
            plan.save(plan_out)
            console.say(f"plan saved in {plan_out}")
        report["plan"] = plan.description()
        report |= self.told
        if plan.report:
            report["search"] = plan.report
        if widths is not None:
            report["budget"] = widths.to_dict()
        if not told:
            forms.warn_planned(model, plan)
        if out is None:
            return report
        after = self.after or After(cost_tokens=0)
        history = after.carry_out(model, plan, self.source, self.dtype, self.calibration or Calibration(), report)
        report["after"] = totals(ffnkit.inspect(model))
        if "cost" in report and not as_json:
            show_cost(report["cost"])
        written = forms.settled(form, model)
        report["saved"] = self.save(model, out, written, history)
        for name, saved in report["saved"].items():
            told_last = forms.elsewhere(name, saved["folder"], model)
            console.say(f"{saved['folder']}, {console.megabytes(saved['bytes'])}: {told_last}")
        return report

    def make_plan(self, model: Any) -> tuple[Any, Any]:
        """The saved plan, or the method's own; and the widths under a budget."""
        import ffnkit

        if self.method is None:
            return ffnkit.Plan.load(self.plan_in), None  # type: ignore[arg-type]
        needed = getattr(self.method, "needs_data", False)
        given = self.calibration is not None and self.calibration.given
        used = needed or (given and self.budget is not None and self.budget.measures)
        data = self.calibration.batches(model, self.source) if used and self.calibration is not None else None
        method, widths = self.method, None
        if self.calibration is not None:
            method = self.calibration.scored(method, self.source)
        if self.budget is not None:
            method, widths = self.budget.settle(method, model, data)
        if needed and self.calibration is not None:
            method, self.told = self.deciding.settled(model, method, self.calibration, self.source)
        with expecting(model, method, data if needed else None, self.told):
            plan = streams.plan(model, method, data if needed else None)
        if needed and self.calibration is not None:
            self.told |= self.deciding.spread(model, method, self.calibration, self.source)
        return plan, widths

    def save(self, model: Any, out: Path, form: str, history: History) -> dict[str, dict[str, Any]]:
        """Save in the form asked for, with tokenizer, card and history; all in place in one step."""
        import ffnkit
        from ffnkit.io.architectures import load_companion

        companion = load_companion(self.source)
        writers: dict[str, Callable[..., Any]] = {"compact": ffnkit.save, "standard": ffnkit.export}
        writers["apart"] = ffnkit.save_apart
        parts = {form: "."} if form != "both" else {"compact": "compact", "standard": "standard"}
        with staging(out) as temporary:
            for name, part in parts.items():
                writers[name](model, temporary / part, tokenizer=companion, card=history.card(model, name))  # type: ignore[arg-type]
                history.write(temporary / part)
        return {name: {"folder": str(out / part), "bytes": weights_bytes(out / part)} for name, part in parts.items()}


def searched(report: dict[str, Any]) -> list[str]:
    """What a method tried and how long it took, in lines."""
    if not report.get("search"):
        return []
    scores = report["search"].items()
    tried = ", ".join(f"{window} {score:.4g}" for window, score in sorted(scores, key=lambda item: -item[1]))
    return [f"  tried in {report['seconds']:.1f} s, the best first: {tried}"]


def totals(inventory: Any) -> dict[str, Any]:
    """The sums of an inventory, without its rows."""
    return {key: value for key, value in inventory.to_dict().items() if not isinstance(value, list)}


def weights_bytes(folder: Path) -> int:
    """Bytes of the weights in ``folder``."""
    from ffnkit.report.measure import bytes_on_disk

    return bytes_on_disk(folder).weights
