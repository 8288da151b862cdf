"""Which layout, what it costs, and why: plain Python that imports no torch.

``predict`` evaluates one training layout, ``predict_serving`` one way of generating, ``recommend``
searches. See docs/planner.md for every formula and its source.
"""

from colrow.planner.catalog import catalog, find_model
from colrow.planner.config_json import model_from_config_json
from colrow.planner.hardware import Device, Hardware, find_hardware, hardware_names
from colrow.planner.inference import ServingPrediction, predict_serving
from colrow.planner.layout import Layout
from colrow.planner.links import Link
from colrow.planner.machine_file import load_machine
from colrow.planner.model import ModelShape
from colrow.planner.predict import Prediction, predict
from colrow.planner.recommend import Recommendation, recommend
from colrow.planner.serving import Serving

__all__ = [
    "Device",
    "Hardware",
    "Layout",
    "Link",
    "ModelShape",
    "Prediction",
    "Recommendation",
    "Serving",
    "ServingPrediction",
    "catalog",
    "find_hardware",
    "find_model",
    "hardware_names",
    "load_machine",
    "model_from_config_json",
    "predict",
    "predict_serving",
    "recommend",
]
