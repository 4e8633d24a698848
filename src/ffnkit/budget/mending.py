"""What mends an assembled choice: output layers of fewer heads refitted, a factor where layers and FFNs went."""

from __future__ import annotations

from collections.abc import Sequence

from ffnkit.budget.losses import Losses
from ffnkit.budget.moves import Choice
from ffnkit.edits import Edit, ReplaceLinear
from ffnkit.errors import FfnkitError
from ffnkit.methods.drop.gaps import Gap, ffns_alone, whole_layers
from ffnkit.methods.drop.head_outputs import refitted_outputs
from ffnkit.methods.drop.heads import RemoveHeads
from ffnkit.methods.drop.standing import stand_ins
from ffnkit.model.finding import block_name, ffns
from ffnkit.model.linear import bare_weight

Mended = tuple[list[Edit], list[Edit]]  # as a plan holds them, and beside heads that leave zeros in their places


def heads_refitted(losses: Losses, choice: Choice, edits: Sequence[Edit]) -> Mended:
    """The output linears of attentions that keep some heads, fitted to what all heads gave."""
    space = losses.space
    kept = {
        each.name: choice.kept[each.name] for each in space.graded if each.name in choice.kept and each.kind == "heads"
    }
    found = [each for each in space.attentions if kept.get(each.name, each.units) < each.units]
    if not found:
        return [], []
    stay = {each.name: losses.stay(each.name, kept[each.name]) for each in found}
    try:
        made = [edit for edit, _ in refitted_outputs(losses.model, losses.fitted, found, stay, RemoveHeads().ridge)]
    except FfnkitError:  # an output linear that is none of ours to refit
        return [], []
    shown: list[Edit] = []
    for attention, edit in zip(found, made, strict=True):
        columns = attention.columns()[attention.members(stay[attention.name])["q"]].flatten()
        tensors = edit.tensors()
        whole = bare_weight(attention.linear("o")).detach().clone()
        whole[:, columns.to(whole.device)] = tensors["weight"].to(whole)
        shown.append(ReplaceLinear.of(edit.target, whole, tensors.get("bias")))
    return made, shown


def gaps_closed(losses: Losses, choice: Choice, edits: Sequence[Edit]) -> Mended:
    """Factors that let what stays stand for layers and FFNs that went, fitted beside all else of the choice."""
    model, going = losses.model, {each.name: each for each in choice.joint if each.kind in ("layers", "ffns")}
    if not going:
        return [], []
    layers = [losses.space.blocks[name] for name, each in going.items() if each.kind == "layers"]
    alone = [[losses.space.ffn(name)] for name, each in going.items() if each.kind == "ffns"]
    dropped = {edit.target: edit for edit in edits if edit.joins and edit.renumbers}
    silent = {edit.target: edit for edit in edits if edit.new_width is not None and edit.target in going}
    alone = [group for group in alone if block_name(group[0].name)]  # behind one in no layer nothing can stand for it
    gaps: list[Gap] = whole_layers(model, layers, lambda group: [dropped[f.name] for f in group if f.name in dropped])
    gaps += ffns_alone(model, alone, lambda ffn: [silent[ffn.name]])
    if not gaps:
        return [], []
    order = {ffn.name: number for number, ffn in enumerate(ffns(model))}
    gaps.sort(key=lambda gap: order[gap.name])
    inside = {id(edit) for gap in gaps for edit in gap.edits}
    beside = [edit for edit in edits if id(edit) not in inside]
    try:
        found, _ = stand_ins(model, list(losses.fitted), gaps, beside=beside)
    except FfnkitError:  # nothing in the model can hold a factor
        return [], []
    return found, found
