"""Figures: what they show is what their tables say, and their tables are what was measured."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measuring import RANK, write_adapter, write_base

from d2surgery import BaseWeights, Checkpoint, LoRA, load
from d2surgery.measures.drift import Drift, delta_drift, expected_point
from d2surgery.measures.likeness import likeness
from d2surgery.measures.ranks import Spectrum
from d2surgery.measures.spectrum import update_spectrum
from d2surgery.measures.subspace import intruders
from d2surgery.measures.table import MEASURES
from d2surgery.reporting.figures import drifts as drift_figures
from d2surgery.reporting.figures import spectra as spectrum_figures
from d2surgery.reporting.figures import training as training_figures
from d2surgery.reporting.figures.likeness import similarity_by_depth, similarity_matrix, subspaces_by_depth
from d2surgery.reporting.figures.parts import OKABE_ITO, Plot
from d2surgery.reporting.tidy import (
    COLUMNS,
    address,
    difference_rows,
    drift_rows,
    picked,
    quantiles,
    spectrum_rows,
    types,
)
from d2surgery.surveying.modules import BaseMatrices, differences, drifts, places, spectra


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load(write_adapter(tmp_path_factory.mktemp("a") / "adapter"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseWeights:
    return BaseWeights(write_base(tmp_path_factory.mktemp("b") / "base"))


@pytest.fixture(scope="module")
def found(checkpoint: Checkpoint) -> dict[str, Spectrum]:
    return dict(spectra(checkpoint))


@pytest.fixture(scope="module")
def moved(checkpoint: Checkpoint, base: BaseWeights) -> dict[str, Drift]:
    return dict(drifts(checkpoint, base))


def nominal(found: dict[str, Spectrum]) -> dict[str, int | None]:
    return dict.fromkeys(found, RANK)


def texts(figure: Any) -> str:
    return str(figure.to_json())


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "layer", "words"),
    [
        ("model.layers.3.self_attn.q_proj", 3, ("self_attn", "q_proj")),
        ("transformer.h.0.attn.c_proj", 0, ("attn", "c_proj")),
        ("encoder.block.11.layer.0.SelfAttention.q", 11, ("encoder", "SelfAttention", "q")),
        ("model.layers.2.mlp.experts.gate_up_proj[7]", 2, ("mlp", "gate_up_proj")),
        ("model.layers.2.mlp.experts.5.w1", 2, ("mlp", "w1")),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", 1, ("lora_unet_down_blocks", "attentions", "proj_in")),
        ("lm_head", None, ("lm_head",)),
        ("model.embed_tokens", None, ("embed_tokens",)),
        ("distilbert.transformer.layer.4.attention.q_lin", 4, ("distilbert", "attention", "q_lin")),
        ("layers.99999999999.q", None, ("q",)),
        ("", None, ("",)),
    ],
)
def test_layer_and_type_are_read_from_the_name(module: str, layer: int | None, words: tuple[str, ...]) -> None:
    assert address(module) == (layer, words)


def test_types_are_as_short_as_tells_them_apart() -> None:
    names = ["h.0.attn.c_proj", "h.1.mlp.c_proj", "h.0.attn.c_attn", "h.1.attn.c_attn"]
    assert list(types(names).values()) == ["attn.c_proj", "mlp.c_proj", "c_attn", "c_attn"]
    sides = [f"{side}.block.0.layer.0.SelfAttention.q" for side in ("encoder", "decoder")]
    assert list(types(sides).values()) == ["encoder.SelfAttention.q", "decoder.SelfAttention.q"]
    assert types(["a.q", "q"]) == {"a.q": "a.q", "q": "q"}


# Tables ---------------------------------------------------------------------------------------------------------------


def test_rows_say_what_their_numbers_are(found: dict[str, Spectrum], moved: dict[str, Drift]) -> None:
    for row in [*spectrum_rows(found, nominal(found)), *drift_rows(moved)]:
        assert tuple(row) == COLUMNS
        assert row["convention"]
        assert row["quality"] in ("exact", "estimate", "bracket")
        assert row["layer"] in (0, 1, 2)
        assert row["type"] in ("q_proj", "down_proj")


def test_a_number_in_the_table_is_that_of_the_record(found: dict[str, Spectrum], moved: dict[str, Drift]) -> None:
    for row in picked(spectrum_rows(found, {}), "stable_rank"):
        assert row["value"] == found[str(row["module"])].stable_rank
    for row in picked(drift_rows(moved), "drift", index="max"):
        assert row["value"] == float(moved[str(row["module"])].drift.max())


def test_quantiles_are_numpys_and_leave_nan_out() -> None:
    values = torch.tensor([3.0, torch.nan, 1.0, 2.0, 10.0], dtype=torch.float64)
    shares = [0.0, 0.05, 0.5, 0.9, 1.0]
    assert quantiles(values, shares) == pytest.approx(np.quantile([1.0, 2.0, 3.0, 10.0], shares).tolist())
    assert quantiles(torch.tensor([torch.nan]), [0.5]) == [None]


def test_nan_is_none_in_a_table(moved: dict[str, Drift]) -> None:
    some = next(iter(moved.values()))
    rows = drift_rows({"q": replace(some, relative_update=float("nan"))})
    assert [row["value"] for row in rows if row["metric"] == "relative_update"] == [None]


# Figures --------------------------------------------------------------------------------------------------------------


def test_the_rank_map_shows_its_table_and_ends_at_the_nominal_rank(found: dict[str, Spectrum]) -> None:
    plot = spectrum_figures.rank_map(found, nominal(found))
    (heat,) = plot.figure.data
    assert (heat.zmin, heat.zmax) == (0, RANK)
    assert list(heat.y) == ["down_proj", "q_proj"]
    shown = {(name, layer): heat.z[i][j] for i, name in enumerate(heat.y) for j, layer in enumerate(heat.x)}
    table = {(r["type"], r["layer"]): r["value"] for r in picked(plot.rows, "energy_entropy_rank")}
    assert shown == table
    assert len(table) == 6


def test_rank_lines_mark_the_nominal_rank(found: dict[str, Spectrum]) -> None:
    plot = spectrum_figures.rank_lines(found, nominal(found))
    assert [shape.y0 for shape in plot.figure.layout.shapes] == [RANK]
    assert "nominal rank 4" in texts(plot.figure)
    drawn = {(t.name, x): y for t in plot.figure.data for x, y in zip(t.x, t.y, strict=True)}
    assert drawn == {(r["type"], r["layer"]): r["value"] for r in picked(plot.rows, "energy_entropy_rank")}
    assert spectrum_figures.rank_lines(found, dict.fromkeys(found)).figure.layout.shapes == ()


def test_the_fan_has_a_panel_per_type_and_a_line_per_layer(found: dict[str, Spectrum]) -> None:
    plot = spectrum_figures.spectrum_fan(found, nominal(found))
    lines = [t for t in plot.figure.data if t.mode != "markers"]
    assert len(lines) == len(found)
    assert {line.xaxis for line in lines} == {"x", "x2"}
    assert len({line.line.color for line in lines}) == 3  # depth
    drawn = sorted(y for line in lines for y in line.y)
    assert drawn == sorted(float(str(r["value"])) for r in plot.rows)
    assert {shape.x0 for shape in plot.figure.layout.shapes} == {RANK}
    assert (plot.figure.layout.xaxis.type, plot.figure.layout.yaxis.type) == ("log", "log")


def test_drift_by_depth_shows_outliers_signed(moved: dict[str, Drift]) -> None:
    plot = drift_figures.drift_by_depth(moved)
    values = {value for trace in plot.figure.data for value in trace.customdata}
    assert values == {r["value"] for r in plot.rows}
    for record in moved.values():
        assert {float(record.drift.min()), float(record.drift.max())} <= values
    below = [y for t in plot.figure.data for y, v in zip(t.y, t.customdata, strict=True) if v < 0]
    assert below
    assert max(below) < 0


def test_distributions_run_from_the_smallest_to_the_largest(moved: dict[str, Drift]) -> None:
    plot = drift_figures.drift_distribution(moved)
    assert [trace.name for trace in plot.figure.data] == ["down_proj", "q_proj"]
    for trace in plot.figure.data:
        pooled = torch.cat([moved[m].drift for m, type_ in types(moved).items() if type_ == trace.name])
        assert (trace.customdata[0], trace.customdata[-1]) == (float(pooled.min()), float(pooled.max()))
        assert list(trace.x) == sorted(trace.x)
        assert (trace.y[0], trace.y[-1]) == (0, 1)
    assert [r["value"] for r in plot.rows] == [v for t in plot.figure.data for v in t.customdata]


def test_length_against_direction_stands_beside_its_null(moved: dict[str, Drift]) -> None:
    plot = drift_figures.magnitude_direction(moved)
    null, *types_, _bar = plot.figure.data
    assert (null.name, len(null.x)) == ("random, same size", len(moved))
    drawn = {(x, y) for t in types_ for x, y in zip(t.x, t.y, strict=True)}
    assert drawn == {(d.delta_direction, d.delta_magnitude) for d in moved.values()}
    assert "ΔD" in plot.figure.layout.xaxis.title.text
    assert "ΔM" in plot.figure.layout.yaxis.title.text


def test_the_null_is_what_random_updates_give() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(300, 200, generator=generator, dtype=torch.float64)
    for size in (1e-3, 3e-2):
        U = size * torch.randn(300, 200, generator=generator, dtype=torch.float64)
        record = delta_drift(LoRA(A=torch.eye(200, dtype=torch.float64), B=U, scaling=1.0), W)
        expected = expected_point(record)
        assert expected == pytest.approx((record.delta_magnitude, record.delta_direction), rel=0.12)
        change = ((W + U).norm(dim=1) - W.norm(dim=1)).abs().mean()
        assert expected[0] == pytest.approx(float(change), rel=0.12)


def test_intruder_profiles_show_every_leading_vector(checkpoint: Checkpoint, base: BaseWeights) -> None:
    where = BaseMatrices(checkpoint, base)
    records = {p.name: intruders(checkpoint.adapter(p.module), where[p], k=5) for p in places(checkpoint)}
    plot = spectrum_figures.intruder_profile(records)
    lines = [t for t in plot.figure.data if len(t.x) == 5]
    assert len(lines) == len(records)
    assert sorted(y for t in lines for y in t.y) == sorted(float(str(r["value"])) for r in plot.rows)
    assert {shape.y0 for shape in plot.figure.layout.shapes} == {0.5}


@pytest.fixture(scope="module")
def pairs(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    return checkpoint, load(write_adapter(tmp_path_factory.mktemp("c") / "other", seed=5))


def test_the_matrix_is_symmetric_and_shows_chance(pairs: tuple[Checkpoint, Checkpoint]) -> None:
    whole = likeness(dict(differences(*pairs)))
    plot = similarity_matrix(["one", "one"], {(0, 1): whole})
    cosine, inside, outside = plot.figure.data
    assert list(cosine.x) == ["one (1)", "one (2)"]
    assert cosine.z[0][1] == cosine.z[1][0] == whole.cosine
    assert inside.z[0][1] == whole.in_features
    assert outside.z[1][0] == whole.out_features
    assert "chance" in inside.text[0][1]
    assert (cosine.zmin, cosine.zmax, inside.zmin) == (-1, 1, 0)
    assert [r["value"] for r in plot.rows] == [whole.cosine, whole.in_features, whole.out_features]
    assert [r["null"] for r in plot.rows] == [whole.cosine_null, whole.in_null, whole.out_null]


def test_similarity_by_depth_draws_the_null(pairs: tuple[Checkpoint, Checkpoint]) -> None:
    found = dict(differences(*pairs))
    plot = similarity_by_depth(found, ("one", "two"))
    widest = max(d.cosine.null_sd for d in found.values())
    assert [(s.y0, s.y1) for s in plot.figure.layout.shapes] == [(-2 * widest, 2 * widest)]
    assert sorted(y for t in plot.figure.data for y in t.y) == sorted(d.cosine.value for d in found.values())
    both = subspaces_by_depth(found, ("one", "two"))
    assert len(both.figure.layout.shapes) == 4  # two sides, the nulls of two widths
    assert len(both.rows) == 2 * len(found)
    assert len(difference_rows(found)) == 4 * len(found)


# Any adapter ----------------------------------------------------------------------------------------------------------


def every_plot(found: dict[str, Spectrum], moved: dict[str, Drift], ranks: dict[str, int | None]) -> Iterator[Plot]:
    yield from (
        spectrum_figures.rank_map(found, ranks),
        spectrum_figures.rank_lines(found, ranks),
        spectrum_figures.size_map(found),
    )
    yield spectrum_figures.spectrum_fan(found, ranks)
    for draw in (
        drift_figures.relative_update_map,
        drift_figures.drift_by_depth,
        drift_figures.drift_distribution,
        drift_figures.magnitude_direction,
    ):
        yield draw(moved)


def renamed(names: list[str], found: dict[str, Spectrum], moved: dict[str, Drift]) -> Any:
    spectrum, drifted = next(iter(found.values())), next(iter(moved.values()))
    return dict.fromkeys(names, spectrum), dict.fromkeys(names, drifted), dict.fromkeys(names, RANK)


NAMES = {
    "one layer": ["model.layers.0.q_proj"],
    "no layer": ["lm_head", "embed_tokens"],
    "some layers": ["lm_head", "model.layers.4.q_proj", "model.layers.9.v_proj"],
    "126 layers": [f"model.layers.{i}.{p}" for i in range(126) for p in ("q", "k", "v", "o", "gate", "up", "down")],
    "experts": [f"model.layers.{i}.mlp.experts.{e}.w1" for i in range(2) for e in range(3)],
}


@pytest.mark.parametrize("case", NAMES)
def test_every_figure_can_be_drawn(case: str, found: dict[str, Spectrum], moved: dict[str, Drift]) -> None:
    for plot in every_plot(*renamed(NAMES[case], found, moved)):
        layout = plot.figure.to_dict()["layout"]
        axes = [axis for name, axis in layout.items() if name.startswith(("xaxis", "yaxis"))]
        assert plot.title
        assert plot.caption
        assert any(axis.get("title", {}).get("text") for axis in axes)
        assert all(len(axis.get("tickvals", ())) <= 20 for axis in axes)
        assert layout["height"] < 1500
        assert len(texts(plot.figure)) < 2_000_000
        assert plot.rows


def test_a_zero_update_has_figures(moved: dict[str, Drift], base: BaseWeights) -> None:
    W = base["model.layers.0.self_attn.q_proj.weight"]
    zero = LoRA(A=torch.ones(2, 16), B=torch.zeros(20, 2), scaling=1.0)
    record, still = {"layers.0.q": update_spectrum(zero)}, {"layers.0.q": delta_drift(zero, W)}
    for plot in every_plot(record, still, {"layers.0.q": 2}):
        assert "NaN" not in texts(plot.figure)


HOSTILE = [
    "layers.0.<img src=x onerror=alert(1)>",
    "layers.1.</script><script>alert(2)</script>",
    'layers.2."><b onmouseover=alert(3)>',
    "layers.3.%{y}<a href='javascript:alert(4)'>x</a>",
    "layers.4.\u202e\x1b[31m" + "n" * 5000,
]


LOG: list[dict[str, Any]] = [
    {"step": 10, "loss": 2.0, "lr": 1e-4, "grad_norm": None, "tokens": 1000, "seconds": 2.0},
    {"step": 10, "eval_loss": 2.5, "accuracy": 0.5},
    {"step": 20, "loss": 1.0, "lr": 5e-5, "grad_norm": 0.25, "tokens": 3000, "seconds": 3.0},
    {"step": 30, "loss": "<b>", "lr": True, "grad_norm": float("inf"), "tokens": 3500, "seconds": 1.0},
]


def test_a_run_is_drawn_as_far_as_its_log_holds_numbers() -> None:
    """Speed is between two lines: a resumed run counts its seconds anew, so that none is between those."""
    plot = training_figures.run_curves(LOG, "mine")
    found = {(row["metric"], row["index"]): row["value"] for row in plot.rows}
    assert found == {
        ("loss", 10): 2.0, ("loss", 20): 1.0, ("eval_loss", 10): 2.5, ("lr", 10): 1e-4, ("lr", 20): 5e-5,
        ("grad_norm", 20): 0.25, ("tokens_per_second", 10): 500.0, ("tokens_per_second", 20): 2000.0,
    }  # fmt: skip
    assert all(row["convention"] and row["adapter"] == "mine" for row in plot.rows)
    drawn = {(trace.name, x): y for trace in plot.figure.data for x, y in zip(trace.x, trace.y, strict=True)}
    assert drawn == {(MEASURES[str(metric)].word, step): value for (metric, step), value in found.items()}


def test_a_long_run_is_thinned_and_says_so() -> None:
    log = [{"step": step, "loss": 1.0} for step in range(1, 10_001)]
    plot = training_figures.run_curves(log)
    assert (len(plot.rows), plot.rows[0]["index"], plot.rows[-1]["index"]) == (2000, 1, 10_000)
    assert "2000 of 10000 lines" in plot.caption
    assert training_figures.run_curves([]).rows == []


def test_names_reach_plotly_without_markup(found: dict[str, Spectrum], moved: dict[str, Drift]) -> None:
    for plot in every_plot(*renamed(HOSTILE, found, moved)):
        text = texts(plot.figure)
        for markup in ("<img", "<b on", "<script", "</script", "<a href", "\u202e", "\x1b", "n" * 100):
            assert markup not in text.replace("\\u003c", "<").replace("\\u003e", ">"), plot.name


def test_figures_use_a_palette_for_all_eyes_and_more_than_colour(found: dict[str, Spectrum]) -> None:
    names = [f"layers.{i}.{p}" for i in range(2) for p in "abcdefg"]
    traces = spectrum_figures.rank_lines(dict.fromkeys(names, next(iter(found.values()))), {}).figure.data
    assert len({t.line.color for t in traces}) == len(traces) == 7
    assert all(t.line.color in OKABE_ITO for t in traces)
    assert len({(t.line.dash, t.marker.symbol) for t in traces}) == 7


def test_fans_of_deep_models_say_what_they_leave_out(found: dict[str, Spectrum], moved: dict[str, Drift]) -> None:
    shown, _, ranks = renamed(NAMES["126 layers"], found, moved)
    plot = spectrum_figures.spectrum_fan(shown, ranks)
    assert f"{7 * (126 - spectrum_figures.FAN_LAYERS)} layers between those shown are left out" in plot.caption
    layers = sorted({int(str(r["layer"])) for r in plot.rows})
    assert (layers[0], layers[-1], len(layers)) == (0, 125, spectrum_figures.FAN_LAYERS)


def test_pure_functions_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (spectrum_figures.spectrum_fan(found, nominal(found)) for _ in range(2))
    assert texts(first.figure) == texts(second.figure)
    assert list(tmp_path.iterdir()) == []


def test_a_plot_prints_in_a_line(found: dict[str, Spectrum]) -> None:
    plot = spectrum_figures.size_map(found)
    assert repr(plot) == f"Plot('size_map': Size, by layer and module type, {len(found)} numbers)"
