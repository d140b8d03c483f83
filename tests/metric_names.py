"""The names of a model's metrics in metrics.json, in order."""

SCORED = ("forget", "retain", "real_authors", "world_facts")
LISTED = (
    "forget_quality", "ks_statistic", "model_utility",
    *(f"{name}_{score}" for name in SCORED for score in ("probability", "rouge", "truth_ratio")),
    "forget_extraction_strength", "forget_exact_memorisation", "retain_extraction_strength",
    *(f"{name}_{measure}" for name in ("forget", "retain")
      for measure in ("empty", "repetition", "length", "ngram_entropy", "ngram_variety")),
)  # fmt: skip
"""For a table with forget and retain rows."""
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus", "reference")
MEMBERSHIP = (
    *(f"mia_{attack}_{rate}" for attack in ATTACKS for rate in ("auc", "tpr")),
    "privleak",
)  # fmt: skip
"""Additionally, for a table with holdout rows."""
