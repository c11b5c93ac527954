"""How far next-token distributions of several models lie apart, and what of it is noise, from their logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, sqrt
from typing import Any

import torch
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor

CLEAR = 8.0  # rms logit errors: 5.7 standard deviations of the difference of two logits


@dataclass(frozen=True, kw_only=True)
class Logits:
    """KL(reference‖merged) of next-token distributions in nats, over `positions`, with the noise beside it."""

    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float  # 0 to 1
    flips: int  # top-1 changes although the reference's margin exceeds CLEAR · rounding_rms
    max_abs: float  # largest |Δlogit|, each position's mean removed
    rms: float
    noise_floor: float  # kl_mean, top1_agreement and max_abs of the live model in the merged dtype
    noise_top1_agreement: float
    noise_max_abs: float
    rounding_floor: float  # kl_mean and rms of a right merge
    rounding_rms: float
    effect: float | None  # mean KL(reference‖base): what the adapter does
    relative_to_effect: float | None  # kl_mean/effect
    strength: float | None  # <z − z_base, d>/<z_right − z_base, d>, d = z_reference − z_base: 1 for a right merge
    strength_error: float | None  # its standard error over prompts
    perplexity: float | None  # of the prompts under the reference; causal models only
    perplexity_merged: float | None
    log_perplexity_change: float | None  # mean over prompts, paired
    log_perplexity_ci: tuple[float, float] | None  # 95 %


def kl_divergence(reference: Float[Tensor, "n v"], other: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(p‖q) = Σ p·(ln p − ln q) per row, from logits, in float64.

    With d = z_q − z_p less its mean Σ p·d this is ln(1 + Σ p·(eᵈ − 1 − d)), whose terms are all positive: nothing
    cancels, so that a divergence of 1e-12 is as sure as one of 1.
    """
    p = reference.double().softmax(-1)
    d = other.double() - reference.double()
    d = d - (p * d).sum(-1, keepdim=True)
    small = d.clamp(max=1.0)  # above, eᵈ may overflow, and there is nothing to cancel
    series = torch.where(small.abs() < 1e-4, small**2 * (0.5 + small / 6), torch.expm1(small) - small)
    direct = (p * (reference.double().log_softmax(-1) - other.double().log_softmax(-1))).sum(-1)
    return torch.where(d.amax(-1) < 1, torch.log1p((p * series).sum(-1)), direct)


class LogitSums:
    """What is compared of the logits of each model, prompt by prompt; only reference and base are kept whole.

    `base` None: it has no head; `tokens` None: the logits do not predict the next token.
    """

    def __init__(
        self, reference: Sequence[Tensor], base: Sequence[Tensor] | None, tokens: Sequence[Tensor] | None
    ) -> None:
        self.reference, self.base, self.tokens = reference, base, tokens
        names = ("served", "right", "merged")
        self.kl: dict[str, list[Tensor]] = {name: [] for name in names}
        self.agree: dict[str, list[Tensor]] = {name: [] for name in names}
        self.squares, self.largest = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        self.margins: list[Tensor] = []
        self.entries = 0
        self.inner: dict[str, list[float]] = {"right": [], "merged": []}
        self.losses: list[tuple[float, float, int]] = []  # reference, merged, tokens; per prompt

    def add(self, model: str, prompt: int, logits: Float[Tensor, "positions vocabulary"]) -> None:
        """Count what "served", "right" or "merged" says. Of vocabularies of two sizes the common part is compared."""
        wanted = self.reference[prompt]
        width = min(wanted.shape[-1], logits.shape[-1])
        z, y = wanted[:, :width].double(), logits[:, :width].double()
        self.kl[model].append(kl_divergence(z, y))
        if model in self.inner and self.base is not None:
            self.inner[model].append(_along_effect(y, self.reference[prompt], self.base[prompt]))
        off = _centred(y - z)
        self.squares[model] += float(off.square().sum())
        self.largest[model] = max(self.largest[model], float(off.abs().max()))
        self.agree[model].append(z.argmax(-1) == y.argmax(-1))
        if model == "merged":
            self.entries += off.numel()
            best = z.topk(2, -1).values
            self.margins.append(best[:, 0] - best[:, 1])
            if self.tokens is not None:
                self.losses.append((_loss(z, self.tokens[prompt]), _loss(y, self.tokens[prompt]), len(z) - 1))

    def record(self) -> Logits:
        kl, agree = torch.cat(self.kl["merged"]), torch.cat(self.agree["merged"])
        rounding_rms = sqrt(self.squares["right"] / self.entries)
        sure = torch.cat(self.margins) > CLEAR * rounding_rms
        effect = self._effect()
        strength, error = self._strength()
        mean = float(kl.mean())
        return Logits(
            positions=len(kl),
            kl_mean=mean,
            kl_p99=float(kl.quantile(0.99)),
            kl_max=float(kl.max()),
            top1_agreement=float(agree.double().mean()),
            flips=int((~agree & sure).sum()),
            max_abs=self.largest["merged"],
            rms=sqrt(self.squares["merged"] / self.entries),
            noise_floor=float(torch.cat(self.kl["served"]).mean()),
            noise_top1_agreement=float(torch.cat(self.agree["served"]).double().mean()),
            noise_max_abs=self.largest["served"],
            rounding_floor=float(torch.cat(self.kl["right"]).mean()),
            rounding_rms=rounding_rms,
            effect=effect,
            relative_to_effect=mean / effect if effect else None,
            strength=strength,
            strength_error=error,
            **self._perplexity(),
        )

    def _effect(self) -> float | None:
        if self.base is None:
            return None
        pairs = [(z, b, min(z.shape[-1], b.shape[-1])) for z, b in zip(self.reference, self.base, strict=True)]
        return float(torch.cat([kl_divergence(z[:, :width], b[:, :width]) for z, b, width in pairs]).mean())

    def _strength(self) -> tuple[float | None, float | None]:
        """Σa/Σb over prompts, and its standard error √(n/(n−1)·Σ(a − λb)²)/|Σb|."""
        below = sum(self.inner["right"])
        if self.base is None or not below:
            return None, None
        strength = sum(self.inner["merged"]) / below
        off = [a - strength * b for a, b in zip(self.inner["merged"], self.inner["right"], strict=True)]
        count = len(off)
        spread = sqrt(count / (count - 1) * sum(x * x for x in off)) if count > 1 else inf
        return strength, spread / abs(below)

    def _perplexity(self) -> dict[str, Any]:
        """exp of the mean loss per token; the change of log-perplexity is the mean of the prompts' own changes."""
        names = ("perplexity", "perplexity_merged", "log_perplexity_change", "log_perplexity_ci")
        if not self.losses:
            return dict.fromkeys(names)
        count = sum(n for _, _, n in self.losses)
        values = [exp(min(sum(loss[at] for loss in self.losses) / count, 700)) for at in (0, 1)]
        changes = torch.tensor([(after - before) / n for before, after, n in self.losses], dtype=torch.float64)
        return dict(zip(names, (*values, float(changes.mean()), _t_interval(changes)), strict=True))


def _centred(rows: Tensor) -> Tensor:
    """Adding a number to all logits of a position changes nothing."""
    return rows - rows.mean(-1, keepdim=True)


def _along_effect(logits: Tensor, reference: Tensor, base: Tensor) -> float:
    """<z − z_base, z_reference − z_base>."""
    width = min(base.shape[-1], reference.shape[-1], logits.shape[-1])
    start = base[:, :width].double()
    direction = _centred(reference[:, :width].double() - start)
    return float(((logits[:, :width] - start) * direction).sum())


def _loss(logits: Tensor, ids: Tensor) -> float:
    """Σ −ln p(next token)."""
    log_p = logits[:-1].log_softmax(-1)
    return float(-log_p.gather(1, ids[0, 1:, None].cpu()).sum())


def _t_interval(values: Tensor) -> tuple[float, float]:
    """mean ± t₀.₉₇₅(n − 1)·s/√n."""
    count = len(values)
    half = float(stdtrit(count - 1, 0.975) * values.std() / sqrt(count)) if count > 1 else inf
    return float(values.mean()) - half, float(values.mean()) + half
