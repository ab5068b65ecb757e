"""The study's numbers as Markdown."""

import math
from typing import Any


def _table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if 0 < value < 0.1 else f"{100 * value:.0f} %"


#: Gates as the variance table calls them.
NAMES = {
    "top_1": "Top-1",
    "random_at_top_1s_rate": "random, Top-1's rate",
    "spec_1": "Spec-1, drawn",
    "expected_spec_1": "Spec-1, expected",
    "label_ratio": "label ratio",
}


def flow(results: dict[str, Any]) -> str:
    """Share of random pairs over 8 tokens at which acceptance falls along the flow; of Top-k, of random ties."""
    rows = []
    for name, own in results["flow"].items():
        cells = [own["8"][measure] for measure in ("top_k", "spec_1", "spec_1_natural", "label_ratio")]
        rows.append(
            [
                f"`{name}`",
                *(_percent(cell["falls"]) for cell in cells),
                f"{max(0, -cells[1]['steepest']):.1g}" if cells[1]["falls"] else "0",
            ]
        )
    return _table(
        [
            "divergence",
            "Top-k: a verdict is lost",
            "Spec-1: falls",
            "Spec-1, natural gradient: falls",
            "label ratio: falls",
            "Spec-1: steepest, a unit of time",
        ],
        rows,
    )


def steps(results: dict[str, Any]) -> str:
    """Share of 600 tabular contexts that lose acceptance at some step of 100, by the size of the step."""
    rows = []
    for name, own in results["steps"].items():
        cells = [_percent(own["none"][size]["top_1"]["falls"]) for size in ("0.5", "2", "8")]
        cells += [_percent(own["none"][size]["spec_1"]["falls"]) for size in ("0.5", "2", "8")]
        rows.append([f"`{name}`", *cells, f"{own['none']['0.5']['spec_1']['largest']:.1g}"])
    sizes = [f"{judge}, η = {size}" for judge in ("Top-1", "Spec-1") for size in ("0.5", "2", "8")]
    return _table(["divergence", *sizes, "Spec-1, η = 0.5: largest fall"], rows)


def gap(results: dict[str, Any]) -> str:
    """Share of 100 linear problems whose TAR ever falls / is lower at the end; KL to the teacher at the end."""
    rows = []
    for name, own in results["gap"].items():
        cells = []
        for gate, judge in (
            ("none", "top_1"),
            ("top_1", "top_1"),
            ("none", "spec_1"),
            ("spec_1", "spec_1"),
            ("label_ratio", "label_ratio"),
        ):
            seen = own[gate]["full"][judge]
            cells.append(f"{_percent(seen['falls'])} / {_percent(seen['ends_lower'])}")
        cells += [f"{own[gate]['full']['kl_end']:.2f}" for gate in ("none", "top_1", "spec_1")]
        rows.append([f"`{name}`", *cells])
    heading = [
        "no gate, Top-1's TAR",
        "Top-1 mask",
        "no gate, Spec-1's TAR",
        "Spec-1 mask",
        "label ratio",
        "KL: no gate",
        "Top-1 mask",
        "Spec-1 mask",
    ]
    return _table(["divergence", *heading], rows)


def bounds(results: dict[str, Any]) -> str:
    rows = [
        [
            f"`{name}`",
            str(own["broken"]),
            f"{own['median_slack']:.3f}",
            *(f"{own['least_slack_by_tv'][b]:.2g}" for b in (1, 4, 7)),
            _percent(own["says_nothing"]),
        ]
        for name, own in results["bounds"].items()
    ]
    return _table(
        [
            "divergence",
            "broken, of 40,000",
            "median slack",
            "least slack, TV 0.1–0.2",
            "TV 0.4–0.5",
            "TV 0.7–0.8",
            "promises nothing",
        ],
        rows,
    )


def ends(results: dict[str, Any]) -> str:
    rows = []
    for name, own in results["fixed_points"].items():
        steep, escape = results["local_rates"][name], results["escape"][name]
        cap = results["escape"]["cap"]
        steps_ = [f"{escape[place]:,}" if escape[place] < cap else f"> {cap:,}" for place in (2, 4, 6)]
        rows.append(
            [
                f"`{name}`",
                f"{own['tabular_median']:.1g}",
                f"{own['tabular_largest']:.2g}",
                "none (kink)" if math.isnan(steep) else f"{steep:.2f}",
                *steps_,
                f"{own['gap_from_forward_kl']:.3f}",
            ]
        )
    heading = [
        "TV to the teacher, median",
        "largest",
        "local rate ÷ forward KL's",
        "escape from 4",
        "from 8",
        "from 12",
        "with a gap: TV to forward KL's end",
    ]
    return _table(["divergence", *heading], rows)


def variance(results: dict[str, Any]) -> str:
    """Forward KL, all gates: medians over 60 problems (where Top-1 accepts anything), and the share of them below 1."""
    rows = []
    for place in ("far", "near"):
        for gate, own in results["variance"][place]["forward_kl"].items():
            for normalizer in ("valid", "weight"):
                v = own[normalizer]
                rows.append(
                    [
                        place,
                        NAMES[gate],
                        normalizer,
                        f"{v['variance']:.2f} ({_percent(v['lower_variance'])})",
                        f"{v['relative']:.2f} ({_percent(v['lower_relative'])})",
                        f"{v['signal']:.2f}",
                        f"{v['cosine']:.2f}",
                    ]
                )
    return _table(
        ["student", "gate", "normalizer", "variance (lower in)", "relative (lower in)", "progress per noise", "cosine"], rows
    )


def smoothness(results: dict[str, Any]) -> str:
    rows = []
    for name, own in results["jumps"].items():
        curve = results["sharpness"][name]
        cells = [f"{own['mask'][which]:.2f}" for which in ("median", "largest")] + [f"{results['kinks'][name]:.2f}"]
        cells += [f"{curve['all'][place]:.2f}" for place in (0, 3, 5)] + [
            f"{curve['accepted'][5]:.2f}",
            f"{curve['gradient'][5]:.2f}",
        ]
        cells += [f"{results['masked_curvature'][name]['ratio']:.2f}", _percent(results["masked_curvature"][name]["steeper"])]
        rows.append([f"`{name}`", *cells])
    heading = [
        "jump at a flip, median",
        "largest",
        "ungated gradient's own kink",
        "curvature, scale 1",
        "scale 8",
        "scale 32",
        "scale 32, accepted",
        "gradient norm, scale 32",
        "masked ÷ ungated",
        "steeper in",
    ]
    return _table(["divergence", *heading], rows)


TABLES = {
    "flow": flow,
    "steps": steps,
    "gap": gap,
    "bounds": bounds,
    "ends": ends,
    "variance": variance,
    "smoothness": smoothness,
}
