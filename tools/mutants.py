"""Small mutations of the source, each with the tests that have to notice it.

    mutants.py check                                             every snippet is in the source exactly once
    mutants.py run [--only NAME ...] [--jobs 2] --out FILE       apply each to a copy, run its tests, tell which survive
    mutants.py run --slow ...                                    the slow tests too

Snippets are looked for in all files below src/, since files move; they are lines of mathematics or of a decision, which
a change of structure leaves as they are. Where a line is rewritten all the same, its mutation is rewritten with it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds for the tests of one mutation


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        tests: files below tests/, with spaces between. only: an expression for pytest's -k.
    """

    name: str
    find: str
    replace: str
    tests: str
    only: str = ""


M = Mutant
ONE = "bert and not albert and not roberta and not camembert and not distilbert and not modernbert"

MUTANTS: tuple[Mutant, ...] = (
    # ops
    M(
        "fold-drops-scale",
        "down=self.down * scale.unsqueeze(-2).to(self.down.dtype)",
        "down=self.down",
        "test_formulas.py",
        "clustering",
    ),
    M(
        "balance-sign",
        "factor = torch.where(largest < 0, -factor, factor)",
        "factor = factor.abs()",
        "test_contract.py",
        "up_to_scale and llama",
    ),
    M(
        "balance-bias",
        "up_bias=None if bias is None else bias * factor,",
        "up_bias=bias,",
        "test_contract.py",
        "up_to_scale and (llama or modernbert)",
    ),
    M(
        "mean-is-a-sum",
        "sums.div_(counts if rows.ndim == 1 else counts[:, None])",
        "sums",
        "test_contract.py",
        "duplicated and gpt2",
    ),
    M(
        "kmeans-worst-restart",
        "min(results, key=lambda result: result[0])",
        "max(results, key=lambda result: result[0])",
        "test_kmeans.py",
    ),
    M(
        "kmeans-cost-of-a-move",
        "rows /= 1 + self.unit / mass[:, None].float()",
        "rows *= 1 + self.unit / mass[:, None].float()",
        "test_kmeans.py",
    ),
    M(
        "seeding-keeps-the-worst",
        "best = (rows @ weights).argmin(1)",
        "best = (rows @ weights).argmax(1)",
        "test_kmeans.py",
    ),
    M(
        "mask-keeps-the-bound",
        "mask = keys > bound",
        "mask = keys >= bound",
        "test_pruning.py",
        "lowest or mask or exact",
    ),
    M(
        "mask-digit-off-by-one",
        "left -= int(sums[digit - 1]) if digit else 0",
        "left -= int(sums[digit]) if digit else 0",
        "test_pruning.py",
        "lowest or mask or exact",
    ),
    M(
        "n-of-m-keeps-the-others",
        "return lowest_of_rows(grouped, size - kept).flatten(-2)",
        "return lowest_of_rows(grouped, kept).flatten(-2)",
        "test_pruning.py",
        "pattern or group",
    ),
    M(
        "entries-without-scale",
        "self.values[first:last], alpha=self.scale)",
        "self.values[first:last])",
        "test_dsee.py",
    ),
    M(
        "entries-gradient-turned",
        "self._scatter(x_grad, rows, column, row)",
        "self._scatter(x_grad, rows, row.clamp(max=x_grad.shape[1] - 1), column.clamp(max=rows.shape[1] - 1))",
        "test_dsee.py",
    ),
    M(
        "matching-worst-pairs",
        ".to(torch.float64, copy=True).neg_()",
        ".to(torch.float64, copy=True)",
        "test_merging.py",
        "permuted and gpt2 or assign",
    ),
    M(
        "correlation-not-centred",
        "((rows.double() - of.mean.to(rows.device)) * inverse).float()",
        "(rows.double() * inverse).float()",
        "test_merging.py",
        "correlation",
    ),
    M(
        "ties-go-to-the-last",
        "(flat == edge).nonzero()[: count - len(above), 0]",
        "(flat == edge).nonzero()[len(above) - count :, 0]",
        "test_support.py",
    ),
    M(
        "residual-not-turned-back",
        "return left.T if tall else left",
        "return left.T.reshape(weight.shape)",
        "test_support.py",
    ),
    M("smallest-singular-vectors", "vectors[:, -rank:]", "vectors[:, :rank]", "test_support.py"),
    M("knapsack-rounds-down", "need = -(-size // unit)", "need = size // unit", "test_budget.py"),
    M(
        "basis-in-the-wrong-order",
        "values.flip(0).clamp_min(0), vectors.flip(1)",
        "values.flip(0).clamp_min(0), vectors",
        "test_sparsegrad.py",
    ),
    M(
        "gradient-turned-the-wrong-way",
        "result @ right.to(gradient).T",
        "result @ (right.to(gradient) if right.shape[0] == right.shape[1] else right.to(gradient).T)",
        "test_sparsegrad.py",
    ),
    M(
        "moments-not-centred",
        "gram.addr_(mean, mean, alpha=-1).diagonal()",
        "gram.diagonal()",
        "test_blockwise.py test_methods.py test_budget.py",
        "calibrated or moments or curve or output_bias",
    ),
    M("rounding-is-variance", "NOISE = 1e-6  #", "NOISE = 0.0  #", "test_refits.py", "one_token"),
    M("who-gives-nothing-counts-for-all", "FAINT = 1e-4  #", "FAINT = 0.0  #", "test_refits.py", "gives_nothing"),
    M("errors-swap-gate-and-up", "ffn.halves(up, -1)", "up.chunk(2, dim=-1)", "test_moe.py", "phi_4"),
    M(
        "curve-adds-what-is-explained",
        "left.addmm_(columns.T, moved, alpha=-1)",
        "left.addmm_(columns.T, moved, alpha=1)",
        "test_budget.py",
    ),
    M(
        "subset-cross-term",
        "change = own.T @ (new @ new.T) - 2 * inner",
        "change = own.T @ (new @ new.T) - inner",
        "test_methods.py test_budget.py",
        "choose or greedy or calibrated or curve",
    ),
    M(
        "refit-towards-zero",
        "missing = (cross.double() - start @ square).T",
        "start, missing = torch.zeros_like(start), cross.double().T",
        "test_methods.py",
        "greedy or refit",
    ),
    M(
        "loss-without-inverse",
        "down.to(gram.dtype).square().sum(0) / inverse",
        "down.to(gram.dtype).square().sum(0)",
        "test_methods.py",
        "scores",
    ),
    M("hsic-divisor", "/ ((n - 1) * (n - 2))", "/ (n * (n - 2))", "test_similarity.py"),
    M(
        "cka-not-normalized",
        "gram_norm(x, y, of_x, of_y) / own**0.5",
        "gram_norm(x, y, of_x, of_y) / own",
        "test_similarity.py",
    ),
    # nn
    M(
        "scaled-without-scale",
        "functional.linear(x * self.scale.to(x.dtype),",
        "functional.linear(x,",
        "test_contract.py",
        f"fold_keeps and {ONE}",
    ),
    M(
        "masked-without-mask",
        "oriented(self.weight * self.mask, self.transposed)",
        "oriented(self.weight, self.transposed)",
        "test_pruning.py test_methods.py",
        "train or zeros or mask",
    ),
    M(
        "lowrank-without-bias",
        "self.first(x))\n        return y if self.bias is None else y + self.bias",
        "self.first(x))\n        return y",
        "test_methods.py",
        "svd",
    ),
    M(
        "merging-fills-the-wrong-zeros",
        "weight.masked_fill_(full_tensor(self.base) == 0, 0.0)",
        "weight.masked_fill_(full_tensor(self.base) != 0, 0.0)",
        "test_pruning.py",
    ),
    M(
        "fingerprint-without-place",
        "(bits * place).sum() * (2 * number + 1)",
        "bits.sum() * (2 * number + 1)",
        "test_sparsegrad.py test_dsee.py test_composition.py",
        "fingerprint or adapter or base",
    ),
    M(
        "fingerprint-not-checked",
        "fingerprint(weight).tolist() != self.fingerprint:",
        "fingerprint(weight).tolist() == []:",
        "test_dsee.py test_sparsegrad.py test_pruning.py",
        "adapter or base",
    ),
    M(
        "fingerprint-not-written",
        "given, parts, fingerprint=fingerprint(layer.base).tolist())",
        "given, parts)",
        "test_dsee.py test_sparsegrad.py test_pruning.py",
        "adapter or base",
    ),
    M(
        "coefficients-of-other-inputs",
        "values.repeat_interleave(self.features[1] // len(values))",
        "values.repeat(self.features[1] // len(values))",
        "test_structured.py",
    ),
    M("l1-grows-values", "(values.abs() - by).clamp_min(0)", "(values.abs() + by)", "test_structured.py"),
    M("dsee-scale", "return self.alpha / max(self.rank, 1)", "return self.alpha", "test_dsee.py"),
    M(
        "dsee-gradient-without-scale",
        "up_grad = (mine.T @ reduced.to(rows.dtype)).to(up.dtype).mul_(scale)",
        "up_grad = (mine.T @ reduced.to(rows.dtype)).to(up.dtype)",
        "test_dsee.py",
    ),
    M(
        "dsee-updates-other-rows",
        "total.index_add_(0, self.rows.long(), product)",
        "total.index_add_(0, self.rows.long() - self.rows.long().min(), product)",
        "test_dsee.py",
    ),
    M(
        "refresh-forgets-what-was-settled",
        "if self.settled is None else self.settled.flatten().clone()",
        "if self.settled is None else torch.zeros_like(self.settled.flatten())",
        "test_formulas.py",
        "refresh",
    ),
    M(
        "wrong-heads-of-a-bias",
        "value.unflatten(0, (-1, total))[:, heads].flatten(0, 1)",
        "value.unflatten(0, (total, -1))[heads].flatten(0, 1)",
        "test_heads.py",
        "bloom or falcon",
    ),
    # methods
    M(
        "heads-scored-by-keys",
        'for role in ("q", "v"):\n        rows',
        'for role in ("k", "v"):\n        rows',
        "test_heads.py test_structured.py",
        "score or weight",
    ),
    M(
        "activity-is-a-square",
        "(total / counts[name]).sqrt() for name",
        "(total / counts[name]) for name",
        "test_formulas.py",
        "activation",
    ),
    M(
        "head-groups-round-down",
        "return -(-left // attention.multiple) * attention.multiple",
        "return max(1, left // attention.multiple) * attention.multiple",
        "test_heads.py",
        "multiple or share or odd or olmo",
    ),
    M(
        "svd-one-sided-root",
        "(u[:, :rank] * root).to(weight.dtype), lost",
        "u[:, :rank].to(weight.dtype), lost",
        "test_formulas.py",
        "svd",
    ),
    M(
        "norms-without-gate",
        "product if neurons.gate is None else product * neurons.gate.norm(dim=-1)",
        "product",
        "test_formulas.py",
        "magnitude",
    ),
    M(
        "largest-keeps-the-smallest",
        "torch.sort(scores.cpu(), dim=-1, descending=True, stable=True).indices[..., :width]",
        "torch.sort(scores.cpu(), dim=-1, descending=False, stable=True).indices[..., :width]",
        "test_formulas.py",
        "magnitude",
    ),
    M(
        "mmd-half-a-gradient",
        "4 / len(points) ** 2), (rows, -4 /",
        "4 / len(points) ** 2), (rows, -2 /",
        "test_methods.py",
        "mmd",
    ),
    M(
        "mmd-without-root",
        "up=found.up * root, up_bias=bias, down=found.down * root)",
        "up=found.up, up_bias=bias, down=found.down)",
        "test_formulas.py",
        "mmd",
    ),
    M(
        "sketch-variance",
        "generator=generator) / count**0.5)",
        "generator=generator) / count)",
        "test_formulas.py",
        "sketch",
    ),
    M(
        "merging-adds-up",
        "sums.map(lambda value: value / len(ffns)).to(first.up.dtype)",
        "sums.to(first.up.dtype)",
        "test_merging.py",
        "permuted and gpt2 or mean",
    ),
    M(
        "refit-mean-of-the-first",
        "return sums.map(lambda value: value / len(group))",
        "return sums",
        "test_merging.py",
        "correct or refit",
    ),
    M(
        "saved-parameters",
        "return out * inner - rank * (out + inner)",
        "return rank * (out + inner) - out * inner",
        "test_methods.py",
        "svd or parameters",
    ),
    # surgery and views
    M(
        "gate-and-up-swapped",
        'values[self.path("up")] = (self.fuse(neurons.gate, neurons.up, -2), bias)',
        'values[self.path("up")] = (self.fuse(neurons.up, neurons.gate, -2), bias)',
        "test_contract.py",
        "full_width and (phi3 or glm or mixtral)",
    ),
    M(
        "tie-is-a-copy",
        "                writer.share(anchor, anchor.name, name)\n",
        "                pass\n",
        "test_merging.py",
        "one or object or shared",
    ),
    M(
        "frozen-weight-trains",
        "        chosen -= {id(layer.base)}\n",
        "        chosen |= {id(layer.base)}\n",
        "test_composition.py test_sparsegrad.py",
        "also or parts or rest or trains",
    ),
    M(
        "flag-of-a-new-weight",
        "parameter = nn.Parameter(new, requires_grad=old.requires_grad)",
        "parameter = nn.Parameter(new)",
        "test_formulas.py",
        "frozen",
    ),
    M(
        "trial-not-taken-back",
        "                parameter.data = data\n",
        "                pass\n",
        "test_apply.py test_analysis.py test_budget.py test_blockwise.py",
    ),
    M(
        "mode-not-restored",
        "            config.problem_type = problem\n"
        "        for module, mode in modes:\n            module.training = mode\n",
        "            config.problem_type = problem\n",
        "test_batches.py test_methods.py test_analysis.py test_sparsegrad.py test_budget.py",
        "mode or train or eval or unchanged or dropout",
    ),
    M(
        "gradients-left-behind",
        "        for parameter, grad in kept.items():\n            parameter.grad = grad",
        "        for parameter, grad in kept.items():\n            pass",
        "test_batches.py test_formulas.py",
        "gradients or unchanged",
    ),
    M("chunks-start-over", "            call.offset = stop\n", "            pass\n", "test_token_masks.py", "chunks"),
    M("segments-weigh", "_fitted(mask.ne(0),", "_fitted(mask,", "test_token_masks.py", "segment"),
    M("text-mask-on-image", "if any(map(IMAGES.match, parts)) or", "if", "test_token_masks.py", "clip"),
    M(
        "window-uncounted",
        "tuple(mask.shape) == tuple(shape):\n        return mask",
        "True:\n        return None",
        "test_token_masks.py",
        "longformer",
    ),
    M("merge-forgets-count", "self.count += other.count", "pass", "test_statistics.py", "merged"),
    M(
        "fused-cut-without-up",
        "return torch.cat((index, index + ffn.width), -1)",
        "return torch.cat((index, index), -1)",
        "test_structured.py",
        "phi3 or glm or fused or cut",
    ),
    M(
        "layer-number-stays",
        "        setattr(owner, key, copy.copy(after))",
        "        pass",
        "test_dropping.py test_layer_numbers.py",
    ),
    M(
        "journal-forgets",
        "        before.restore()\n        raise",
        "        raise",
        "test_apply.py",
        "half_way and bert",
    ),
    M("rehearsal-skipped", "    rehearse(model, edits)\n", "", "test_apply.py", "what_the_rehearsal_refuses"),
    M("order-unchecked", "if same and not edit.repeats:", "if False:", "test_apply.py", "out_of_order or successor"),
    M("ties-unchecked", "if id(module) not in inside]", "if False]", "test_apply.py", "tie or tied"),
    M(
        "plan-lends-its-tensors",
        "{name: value.clone() for name, value in parts.items()}",
        "dict(parts)",
        "test_apply.py",
        "changes_no_bit and (dsee or sparsegrad)",
    ),
    # masking, untying, checkpoint, hook
    M(
        "masks-add-up",
        "each.mask = each.mask & stored",
        "each.mask = each.mask | stored",
        "test_pruning.py",
        "mask or again or twice",
    ),
    M("parted-weights-stay-one", "            if id(value) in taken:", "            if False:", "test_tied_lora.py"),
    M(
        "padding-in-front",
        '"down": (0, more)}',
        '"down": (more, 0)}',
        "test_contract.py",
        f"standard_exports and ragged and ({ONE} or gpt2 or llama)",
    ),
    M(
        "saved-without-updates",
        '{"state_dict": plain_state(model), **save_pretrained_kwargs}',
        "save_pretrained_kwargs",
        "test_formulas.py",
        "updates",
    ),
    M(
        "export-not-compared",
        "if error is not None and not error <= limit:",
        "if error is not None and error < 0:",
        "test_checkpoint.py",
        "other_outputs",
    ),
    M(
        "format-not-checked",
        "or format not in range(1, FORMAT + 1):",
        "or format == -1:",
        "test_checkpoint.py",
        "format",
    ),
    M(
        "sharing-not-written",
        '"twins": list(ffn.tied),',
        '"twins": [],',
        "test_merging.py",
        "tie_is_one_object",
    ),
    M(
        "key-not-written",
        "None if key is None else list(key),",
        "None,",
        "test_checkpoint.py test_contract.py",
        f"(ragged or key or config) and ({ONE} or gpt2 or not compact)",
    ),
    # budget, analysis
    M(
        "budget-of-everything",
        "return int(budget * whole * (1 + 1e-12))",
        "return int(budget * (whole + fixed))",
        "test_budget.py",
    ),
    M(
        "those-that-decide-tell-too",
        "for each in (odd, ~odd))",
        "for each in (odd, odd | True))",
        "test_mixing.py test_held_out.py test_refits.py",
    ),
    M("shares-beyond-the-fits", "if shares.sum() > 1:", "if shares.sum() > 10:", "test_mixing.py"),
    M(
        "the-share-that-fits-worst",
        "return min(tried, key=lambda each: error",
        "return max(tried, key=lambda each: error",
        "test_mixing.py",
    ),
    M("noise-is-gone-on-with", "and taken(fitted)[0] <= ENOUGH", "and taken(fitted)[0] < 0", "test_mixing.py"),
    M(
        "one-ridge-alone",
        "if decide is None or len(ridges) + len(beside) < 2:",
        "if True:",
        "test_mixing.py test_refits.py",
    ),
    M(
        "mean-of-the-rows-stays",
        "rows, gap = rows - self.centre[0], gap - ",
        "rows, gap = rows, gap - ",
        "test_mixing.py test_refits.py",
    ),
    M(
        "held-tokens-are-fitted",
        "self._moments.add(both[~out], None if weights is None else weights[~out])",
        "self._moments.add(both, weights)",
        "test_refits.py",
    ),
    M(
        "the-ridge-that-moves-most",
        "return min(made, key=lambda each: self._far(",
        "return max(made, key=lambda each: self._far(",
        "test_refits.py",
    ),
    M(
        "shared-owns-part",
        "return local.between(start[0], end[0], share), [owns[id(new)] for new in end[1]]",
        "return local.between(start[0], end[0], share), [dataclasses.replace(owns[id(new)]) for new in end[1]]",
        "test_sharing.py",
    ),
    M(
        "refit-bias-sign",
        "old.down.double() @ mean - down @ mean[kept]",
        "old.down.double() @ mean + down @ mean[kept]",
        "test_budget.py",
    ),
    M("sign-kernel", "adam += block @ block.sign().T", "adam += block.sign() @ block.sign().T", "test_analysis.py"),
    M(
        "error-is-a-square",
        "return math.sqrt(self.gap / self.whole)",
        "return self.gap / self.whole",
        "test_analysis.py",
    ),
    M(
        "energy-of-fewer",
        "return min(range(len(self.shares)), key=lambda i: abs(self.shares[i] - 0.01))",
        "return 0",
        "test_energy.py",
        "nearest",
    ),
    # tasks
    M(
        "f1-of-the-other-class",
        'f1_score(labels, predicted, pos_label=1, average="binary"',
        'f1_score(labels, predicted, pos_label=0, average="binary"',
        "test_tasks.py",
        "metric or f1",
    ),
    M(
        "mse-more-is-better",
        '"mse": Metric("regression", _mse, greater_is_better=False, greatest=None)',
        '"mse": Metric("regression", _mse, greatest=None)',
        "test_tasks.py test_tune.py",
        "metric or better or mse or regression",
    ),
    M(
        "nist-information",
        "math.log2(counts[n - 1][gram[:-1]] / counts[n][gram])",
        "math.log2(counts[n][gram] / counts[n - 1][gram[:-1]])",
        "test_text_metrics.py",
    ),
    M("cider-not-clipped", "min(weight, other[gram]) * other[gram]", "weight * other[gram]", "test_text_metrics.py"),
    M(
        "accuracy-upside-down",
        "float(np.mean(predicted == labels))",
        "float(np.mean(predicted != labels))",
        "test_tasks.py",
        "metric or accuracy",
    ),
    # tune
    M(
        "accumulation-mean",
        "own * self.current_gradient_accumulation_steps / num_items_in_batch.clamp(min=1)",
        "own / num_items_in_batch.clamp(min=1)",
        "test_tune.py test_generation.py",
        "accumul",
    ),
    M(
        "grouped-seed-ignored",
        "torch.Generator().manual_seed(self.seed + self.epoch)",
        "torch.Generator().manual_seed(self.epoch)",
        "test_tune.py",
        "group or length or seed",
    ),
    M(
        "temperature-not-squared",
        "return temperature**2 * (theirs.exp()",
        "return temperature * (theirs.exp()",
        "test_distil_logits.py",
    ),
    M(
        "kl-the-other-way",
        "(theirs.exp() * (theirs - ours)).sum(-1)",
        "(ours.exp() * (ours - theirs)).sum(-1)",
        "test_distil_logits.py",
    ),
    M(
        "padding-counts",
        "return (squared * mask).sum() / mask.sum().clamp(min=1)",
        "return squared.mean()",
        "test_distil.py test_distil_variants.py",
    ),
    M(
        "meprop-without-sign",
        "places = grad.abs().topk(",
        "places = grad.topk(",
        "test_sparsegrad.py test_tune.py",
        "meprop",
    ),
    M("lora-alpha", "lora_alpha=tuner.alpha,", "lora_alpha=2 * tuner.alpha,", "test_formulas.py", "scaled_by_alpha"),
    M(
        "zeros-of-the-others",
        "zero = parameter.detach() == 0",
        "zero = parameter.detach() != 0",
        "test_pruning.py",
        "zero",
    ),
    M(
        "betas-swapped",
        "            adam_beta1=s.betas[0],\n            adam_beta2=s.betas[1],",
        "            adam_beta1=s.betas[1],\n            adam_beta2=s.betas[0],",
        "test_formulas.py",
        "adam",
    ),
    M("data-seed-ignored", "            data_seed=seed,", "            data_seed=0,", "test_tune.py", "seed or order"),
    M(
        "rates-swapped",
        "            learning_rate=s.learning_rate,",
        "            learning_rate=s.weight_decay or s.eps,",
        "test_tune.py",
        "learns or setting or argument or rate",
    ),
    M(
        "resume-with-another-run",
        "        elif ours != theirs:\n            names.append(key)",
        "        elif ours != theirs:\n            pass",
        "test_tune.py",
        "resum or another or differ or other",
    ),
    M(
        "broken-checkpoints-stay",
        "        if not is_whole(path):\n            shutil.rmtree(path, ignore_errors=True)",
        "        if not is_whole(path):\n            pass",
        "test_tune.py",
        "half_written",
    ),
    M(
        "clock-forgets",
        '"seconds": self.total(), "step_seconds": self.step_seconds',
        '"seconds": 0.0, "step_seconds": 0.0',
        "test_tune.py",
        "seconds_so_far",
    ),
    # recipe, report, cli, files, loading
    M(
        "done-is-not-done",
        'return self.marker("done") is not None',
        'return self.marker("done") is None',
        "test_recipe_run.py",
    ),
    M(
        "facts-without-tune",
        'plain["tune"].items() if name not in HARMLESS',
        'plain["tune"].items() if name in HARMLESS',
        "test_recipe_run.py test_recipe.py test_stages.py",
    ),
    M("deviation-of-all", "for v in values) / (n - 1)) if n > 1", "for v in values) / n) if n > 1", "test_report.py"),
    M(
        "difference-the-other-way",
        "deltas = [value - theirs[seed] for",
        "deltas = [theirs[seed] - value for",
        "test_report.py",
    ),
    M(
        "hidden-tokens-not-scored",
        "ids.masked_fill(~hidden, -100)",
        "ids.masked_fill(hidden, -100)",
        "test_dsee_reports.py test_report.py",
        "forget or neutral or masked",
    ),
    M(
        "batches-count-alike",
        "total, weight = total + float(loss) * count, weight + count",
        "total, weight = total + float(loss), weight + 1",
        "test_formulas.py",
        "weighed_by",
    ),
    M(
        "flags-behind-dashes",
        "if i >= end or word not in GLOBAL_FLAGS]",
        "if word not in GLOBAL_FLAGS]",
        "test_cli.py",
        "flags",
    ),
    M(
        "output-over-its-source",
        "if target == read or read.is_relative_to(target):",
        "if target == read:",
        "test_cli.py",
        "output or written or refus or lost",
    ),
    M(
        "others-not-kept",
        "            elif not os.path.lexists(new / name):\n                yield name",
        "            elif False:\n                yield name",
        "test_checkpoint.py test_folders.py",
        "keep or other or stay or folder",
    ),
    M(
        "nan-goes-through",
        "not (count := sum(int(bad(part).sum()) for part in parts)):",
        "not (count := 0):",
        "test_checkpoint.py test_cli.py",
        "NaN or nan or damaged or infinit",
    ),
    M(
        "drawn-head-not-noticed",
        "for key in named if key in absent and is_head(model, key)",
        "for key in named if is_head(model, key)",
        "test_formulas.py",
        "drawn_one",
    ),
)


def sources(root: Path) -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in sorted((root / "src").rglob("*.py"))}


def places(mutant: Mutant, texts: dict[Path, str]) -> list[Path]:
    """The files that hold the snippet, as often as they do."""
    return [path for path, text in texts.items() for _ in range(text.count(mutant.find))]


def check(mutants: tuple[Mutant, ...]) -> int:
    texts = sources(ROOT)
    wrong = 0
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names), "two mutations share a name"
    for mutant in mutants:
        found = places(mutant, texts)
        missing = [name for name in mutant.tests.split() if not (ROOT / "tests" / name).is_file()]
        if len(found) != 1 or missing or mutant.find == mutant.replace:
            wrong += 1
            print(f"{mutant.name}: found {len(found)} times{', no ' + ' '.join(missing) if missing else ''}")
    print(f"{len(mutants)} mutations, {wrong} do not fit")
    return 1 if wrong else 0


def tested(root: Path, mutant: Mutant, slow: bool) -> tuple[int, str]:
    """The exit code of pytest (0 passed, 1 failed, 5 nothing chosen, -1 too long) and its last lines."""
    path = os.pathsep.join(str(root / name) for name in ("src", "tests"))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header"]
    command += [] if slow else ["-m", "not slow"]
    command += [*(f"tests/{name}" for name in mutant.tests.split()), *(["-k", mutant.only] if mutant.only else [])]
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return -1, "too long"
    return done.returncode, "\n".join(done.stdout.strip().splitlines()[-3:])


def one(mutant: Mutant | None, tests: Mutant, home: Path, slow: bool) -> dict[str, Any]:
    """The tests of ``tests`` on a copy with ``mutant`` in it, or on an unchanged one."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=home) as folder:
        root = Path(folder)
        for name in ("src", "tests", "docs", "benchmarks"):  # some tests read those too
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff"):
            if (ROOT / name).is_file():
                shutil.copy(ROOT / name, root / name)
        if mutant is not None:
            texts = sources(root)
            (path,) = places(mutant, texts)
            path.write_text(texts[path].replace(mutant.find, mutant.replace), encoding="utf-8")
        code, tail = tested(root, tests, slow)
    what = {0: "survived", 1: "caught", 2: "caught", -1: "too long"}.get(code, f"pytest exit code {code}")
    return {"result": what, "seconds": round(time.perf_counter() - began, 1), "tail": tail}


def unchanged(mutants: tuple[Mutant, ...]) -> list[Mutant]:
    """For each file of tests all that is asked of it, in one: they have to pass without any mutation."""
    asked: dict[str, set[str]] = {}
    for mutant in mutants:
        for file in mutant.tests.split():
            asked.setdefault(file, set()).add(mutant.only)
    whole = {
        file: "" if "" in only else " or ".join(f"({each})" for each in sorted(only)) for file, only in asked.items()
    }
    return [Mutant(file, "", "", file, only) for file, only in whole.items()]


def run(mutants: tuple[Mutant, ...], jobs: int, out: Path, unmutated: bool = True, slow: bool = False) -> int:
    if check(mutants):
        return 1
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(jobs) as pool:
        plain = unchanged(mutants) if unmutated else []
        failing = set()
        for mutant, found in pool.map(lambda m: (m, one(None, m, Path(home), slow)), plain):
            if found["result"] not in ("survived", "pytest exit code 5"):  # 5: another file holds the tests
                failing.add(mutant.tests)
                print(f"not usable: {mutant.tests} without any mutation: {found['result']}\n{found['tail']}")
        fit = [m for m in mutants if not failing & set(m.tests.split())]

        def work(mutant: Mutant) -> tuple[Mutant, dict[str, Any]]:
            found = one(mutant, mutant, Path(home), slow)
            print(f"{found['result']:>9}  {found['seconds']:6.1f} s  {mutant.name}", flush=True)
            return mutant, found

        for mutant, found in pool.map(work, fit):
            results[mutant.name] = found | {"tests": mutant.tests, "only": mutant.only}
    results |= {m.name: {"result": "tests fail without it"} for m in mutants if failing & set(m.tests.split())}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    alive = [name for name, found in results.items() if found["result"] != "caught"]
    print(f"{len(results) - len(alive)} of {len(results)} caught; not: {', '.join(alive) or 'none'}")
    return 1 if alive else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="command", required=True)
    sub.add_parser("check")
    running = sub.add_parser("run")
    running.add_argument("--only", nargs="*", default=[], help="names of mutations")
    running.add_argument("--jobs", type=int, default=1)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--trust", action="store_true", help="the tests are known to pass without any mutation")
    running.add_argument("--slow", action="store_true", help="its slow tests have to notice it, or its fast ones")
    given = parser.parse_args()
    if given.command == "check":
        return check(MUTANTS)
    unknown = set(given.only) - {m.name for m in MUTANTS}
    if unknown:
        raise SystemExit(f"no such mutation: {', '.join(sorted(unknown))}")
    wanted = tuple(m for m in MUTANTS if not given.only or m.name in given.only)
    return run(wanted, given.jobs, given.out, not given.trust, given.slow)


if __name__ == "__main__":
    sys.exit(main())
