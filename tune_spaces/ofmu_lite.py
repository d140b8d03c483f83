"""Search space of OFMU with the preset lite: the penalty at the last inner iterate only."""

from tune_spaces import RATE, Choice, Integers, Knob, Space, Uniform, ZeroOrLogUniform, parse_prior

SPACE = Space(
    (
        Knob("ofmu.inner.lr", parse_prior(RATE[0]), RATE[1]),
        Knob("ofmu.outer.lr", parse_prior(RATE[0]), RATE[1]),
        Knob(
            "ofmu.inner_steps",
            Integers(1, 6),
            "up to the shorter end of the paper's 5 to 10 (arXiv 2509.22483), for small budgets",
        ),
        Knob(
            "ofmu.outer_steps",
            Integers(1, 8),
            "1 in the paper; small models gained from more (docs/decisions.md)",
        ),
        Knob(
            "ofmu.beta",
            ZeroOrLogUniform(0.01, 1.0),
            "a decade around the default 0.1, and none: it was not worth its passes in the ablation (docs/results.md)",
        ),
        Knob(
            "ofmu.rho",
            ZeroOrLogUniform(1e-5, 1e-2),
            "small, and none: the penalty slows forgetting (docs/decisions.md)",
        ),
        Knob(
            "ofmu.rho_growth", Uniform(1.0, 1.1), "around the default; the paper requires more than 1", given="ofmu.rho"
        ),
        Knob(
            "ofmu.inner.decay",
            Choice(("constant", "linear")),
            "constant in the paper; a constant rate collapsed utility in the ablation (docs/results.md)",
        ),
    )
)
