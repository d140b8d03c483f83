"""What a run writes for people: the HTML page, the model card and the manifest. Loads no torch."""

from ofmu_ray.reporting.card import write_model_card
from ofmu_ray.reporting.manifest import build_manifest
from ofmu_ray.reporting.page import ReportData, write_report

__all__ = ["ReportData", "build_manifest", "write_model_card", "write_report"]
