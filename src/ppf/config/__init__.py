"""What each command can be told. A default lives here once; its docstring is the `--help`."""

from ppf.config.checks import CompensateName, DtypeName, PredictorName, QuantName, ScoreName
from ppf.config.evaluate import BenchConfig, EvalConfig
from ppf.config.fit import DemoConfig, FitConfig
from ppf.config.models import ModelsConfig
from ppf.config.prune import ExportConfig, PruneConfig
from ppf.config.recover import RecoverConfig, TrainDtypeName
from ppf.config.repair import RepairConfig
from ppf.config.report import ReportConfig
from ppf.config.serve import ServeConfig
from ppf.config.target import PlanTarget, PolicyConfig, Target

__all__ = [
    "BenchConfig",
    "CompensateName",
    "DemoConfig",
    "DtypeName",
    "EvalConfig",
    "ExportConfig",
    "FitConfig",
    "ModelsConfig",
    "PlanTarget",
    "PolicyConfig",
    "PredictorName",
    "PruneConfig",
    "QuantName",
    "RecoverConfig",
    "RepairConfig",
    "ReportConfig",
    "ScoreName",
    "ServeConfig",
    "Target",
    "TrainDtypeName",
]
