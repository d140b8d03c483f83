"""OFMU-Ray: bi-level machine unlearning (OFMU, arXiv 2509.22483) on Ray, DeepSpeed, MLflow and transformers.

Importing the package imports neither torch nor Ray; each room imports what it needs where it needs it.
"""

__version__ = "0.1.0"
