"""The modules that declare metrics; they are imported here, so that reports list metrics in this order."""

# isort: off
from ofmu_ray.metrics import tofu as tofu
from ofmu_ray.metrics import passages as passages
from ofmu_ray.metrics import choices_right as choices_right
from ofmu_ray.metrics import generations as generations
from ofmu_ray.metrics import inference as inference
from ofmu_ray.metrics import muse as muse
from ofmu_ray.metrics import probes as probes
from ofmu_ray.metrics import aggregate as aggregate
from ofmu_ray.metrics import under_attack as under_attack
from ofmu_ray.metrics import classification as classification
