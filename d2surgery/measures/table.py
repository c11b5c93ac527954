"""Every number that is shown, once: the word for it, its formula, and what it tells. No torch.

Terminal, pages, CSV files and `explain` take their words from here, so that one number has one name.
"""

from typing import Literal, NamedTuple

Of = Literal["update", "delta"]
Method = Literal["structural", "exact", "head-tail"]
"""How singular values are found; see `spectrum`."""
NUMBERS = (
    "entropy_rank",
    "energy_entropy_rank",
    "stable_rank",
    "participation_ratio",
    "energy_rank_90",
    "energy_rank_95",
    "energy_rank_99",
    "frobenius_norm",
    "spectral_norm",
    "nuclear_norm",
)
"""What follows from all singular values of a matrix."""


class Measure(NamedTuple):
    """Of one number."""

    word: str
    """As a column or an axis calls it."""
    formula: str
    """Its definition and convention, for a line of a table."""
    says: str
    """Its range, and how to read it."""


MEASURES = {
    # Of the singular values σ₁ ≥ σ₂ ≥ … of an update or a delta.
    "nominal_rank": Measure(
        "rank",
        "what the factors have room for: r; 2r for D2-LoRA; none for Dual LoRA",
        "1 and more. What was paid for; `rank used` says how much of it works.",
    ),
    "numerical_rank": Measure(
        "numerical rank",
        "number of σ above σ₁·max(m, n)·eps64",
        "0 to min(m, n). Whether the factors are of full rank; it does not say how much each direction weighs.",
    ),
    "energy_entropy_rank": Measure(
        "rank used",
        "exp of the entropy of σ²/Σσ²",
        "1 to n, 0 for zero. How many directions carry the change, weighted by energy; unlike entropy_rank it does not "
        "count the tail.",
    ),
    "entropy_rank": Measure(
        "entropy rank",
        "exp of the entropy of σ/Σσ (Roy and Vetterli 2007)",
        "1 to n, 0 for zero; never less than rank used. The effective rank of the literature: it counts the tail, so "
        "on what is dense or rounded it measures noise.",
    ),
    "stable_rank": Measure("stable", "Σσ²/σ₁²", "1 to n. Near 1: one direction has nearly all of the energy."),
    "participation_ratio": Measure("participation ratio", "(Σσ²)²/Σσ⁴", "1 to n. Between stable rank and rank used."),
    **{
        f"energy_rank_{share}": Measure(
            f"k{share}",
            f"least k whose leading σ² make up {share} % of Σσ² (not of Σσ)",
            f"1 to n. The rank to resize to where {100 - share} % of the energy may go.",
        )
        for share in (90, 95, 99)
    },
    "frobenius_norm": Measure("‖·‖F", "√Σσ²", "The size of the whole matrix; it grows with the matrix's sides."),
    "rms_entry": Measure(
        "RMS",
        "‖·‖F/√(mn), the root mean square of the entries",
        "The size that can be compared between matrices of different shape where no base is given.",
    ),
    "spectral_norm": Measure("σ₁", "σ₁", "The most that any input of length 1 is changed."),
    "nuclear_norm": Measure("Σσ", "Σσ", "The sum of the singular values."),
    "singular_value": Measure("σᵢ", "σᵢ", "The i-th largest singular value."),
    "relative_singular_value": Measure("σᵢ/σ₁", "σᵢ/σ₁", "0 to 1. A line that falls early uses few directions."),
    # Against the base.
    "relative_update": Measure(
        "update",
        "‖delta‖F/‖W0‖F",
        "How far the weight moves, relative to its own size; 0.01 is common, 0.3 is another model.",
    ),
    "drift": Measure(
        "drift",
        "‖w′‖/‖w‖ − 1 per vector, signed",
        "How much longer a row or a column of the weight becomes; 0 is none.",
    ),
    "delta_magnitude": Measure(
        "ΔM",
        "ΔM: mean of abs(‖w′‖ − ‖w‖) over vectors (DoRA, arXiv:2402.09353)",
        "Change of length in units of the weights. Read it against ΔD: random updates move both.",
    ),
    "delta_direction": Measure(
        "ΔD",
        "ΔD: mean of 1 − cos(w′, w) over vectors (DoRA, arXiv:2402.09353)",
        "0 to 2. Change of direction; 0 is none, 1 a right angle. Tables call it 1 − cos.",
    ),
    "intruder_cosine": Measure(
        "intruders",
        "largest abs cosine with any left singular vector of W0 (arXiv:2410.21228)",
        "0 to 1. Below 0.5 the direction is new to the base: an intruder.",
    ),
    # Of two adapters.
    "cosine": Measure(
        "cosine",
        "<M, N>/(‖M‖‖N‖); null: one standard deviation of unrelated matrices, 1/√(mn)",
        "−1 to 1. 1 is the same update, 0 nothing in common, −1 the opposite.",
    ),
    "subspace_similarity": Measure(
        "φ",
        "φ(r, r) = ‖U₁ᵀU₂‖²F/r (LoRA, section 7.2); null: r/n",
        "0 to 1. Share of one's input or output directions that the other uses too.",
    ),
    "sign_agreement": Measure(
        "signs",
        "share of entries with equal sign; null: 1 − arccos(cosine)/π",
        "0 to 1. Below one half the two work against each other; large modules are sampled, with a standard error.",
    ),
    # Of surgery.
    "relative_error": Measure(
        "error", "‖stored − wanted‖F/‖wanted‖F of the delta", "0 and more. What surgery lost; 1 is as bad as nothing."
    ),
    "spectral_error": Measure(
        "error in σ₁", "‖stored − wanted‖₂/‖wanted‖₂ of the delta", "0 and more. The worst case over inputs."
    ),
    "weighted_error": Measure(
        "error in outputs",
        "the relative error of the delta times diag(√ second moments of the inputs)",
        "0 and more. What surgery lost on the calibration text.",
    ),
    "least_error": Measure(
        "least error",
        "√Σ_{i>k} σᵢ²/√Σσ²: the least relative error of any matrix of rank k",
        "0 to 1. No method does better.",
    ),
    # Of a training run.
    "loss": Measure(
        "training loss",
        "mean cross-entropy of the answers' tokens over the steps since the last line, in nats",
        "0 and more. It moves with the rows that a step had; held-out loss tells more.",
    ),
    "eval_loss": Measure(
        "held-out loss",
        "mean cross-entropy of the answers' tokens of the held-out items, in nats",
        "0 and more. Where it rises while the training loss falls, the run learns its items by heart.",
    ),
    "grad_norm": Measure(
        "gradient norm",
        "√Σ g² over all trained parameters, before clipping",
        "0 and more. Steps of many times the usual are clipped, where max_grad_norm says so.",
    ),
    "lr": Measure("learning rate", "of the step, by its schedule", "What the optimizer multiplies its step with."),
    "tokens_per_second": Measure(
        "tokens a second",
        "tokens of the batches over seconds of the steps, without evaluations and checkpoints",
        "Compare runs of one machine, base and length.",
    ),
    # Of a merge.
    "gain": Measure(
        "gain",
        "<merged − W0, delta>/‖delta‖²",
        "1: rounding to the stored dtype kept all of the delta; below 0.95 part of it is lost, in a right merge too.",
    ),
    "survival": Measure(
        "survival",
        "gain, relative error, cosine and share of changed entries of merged − W0 against the delta",
        "What rounding to the stored dtype leaves of an adapter; tables show the gain.",
    ),
    "strength": Measure(
        "strength",
        "λ̂ = 1 + <M − E, delta>/<E − W0, delta>, M merged, E expected",
        "1 for a right merge, 0 for the base, 2 where the delta was added twice.",
    ),
    "replay": Measure(
        "replay",
        "the merge computed again by the recipe of a known merger, compared bit for bit",
        "What a recipe gives bit for bit was merged by its arithmetic, and is right without any threshold.",
    ),
    "mismatched_share": Measure(
        "differ", "share of elements whose bits are not the expected ones", "0 to 1. Rounding alone can make it large."
    ),
}


def find(word: str) -> str | None:
    """The measure of this name, or whose word this is: `energy-entropy-rank`, `rank used`, `ΔM`, `k90`."""
    name, words = _plain(word), {_plain(measure.word): key for key, measure in MEASURES.items()}
    plain = {"dm": "delta_magnitude", "dd": "delta_direction", "used": "energy_entropy_rank"}
    return name if name in MEASURES else words.get(name) or plain.get(name)


def _plain(word: str) -> str:
    return word.strip().lower().replace("-", "_").replace(" ", "_")
