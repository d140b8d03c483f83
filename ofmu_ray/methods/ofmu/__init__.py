"""OFMU: its options (options.py) and its rounds (method.py)."""

from ofmu_ray.methods.ofmu.method import OFMU
from ofmu_ray.methods.ofmu.options import BOUNDED, PRESETS, OFMUConfig, PresetName

__all__ = ["BOUNDED", "OFMU", "PRESETS", "OFMUConfig", "PresetName"]
