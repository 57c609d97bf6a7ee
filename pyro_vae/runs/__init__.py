"""A run's whole life: settings, training, scoring, reading back, comparing, studies, figures.

``train(Settings(...))`` makes a :class:`Run`, ``load(directory)`` reads one back; ``score``, ``compare`` and ``study``
take runs or their directories. The command ``pyro-vae`` reads the same settings from a command line.
"""

from pyro_vae.errors import RunError, need_extra

NEEDED = "jinja2 jsonargparse yaml xarray h5netcdf arviz matplotlib pandas torchvision PIL sklearn scipy safetensors"
need_extra("runs", [*NEEDED.split(), "tensorboard"])

from pyro_vae.runs import figures, judge
from pyro_vae.runs.build import build, load_dataset, make
from pyro_vae.runs.cards import card
from pyro_vae.runs.classifying import (
    ClassificationSettings,
    Classified,
    classification_table,
    classify,
    run_classification,
    without_class,
)
from pyro_vae.runs.comparing import Comparison, ComparisonSettings, Difference, annealed_alike, compare, difference_of
from pyro_vae.runs.directory import (
    check_empty,
    check_run_dir,
    choose_device,
    conclude,
    make_directory,
    open_run,
    provenance,
    run_dir_for,
    table,
    write_csv,
    write_evidence,
    write_json,
    write_text,
    write_weights,
    writing,
)
from pyro_vae.runs.evaluating import Scored, evaluate, evaluation_table, score
from pyro_vae.runs.exploring import ExploreSettings, explore
from pyro_vae.runs.exporting import Exported, ExportSettings, export
from pyro_vae.runs.loading import (
    Finished,
    Run,
    images_of,
    load,
    load_data,
    load_finished,
    load_model,
    load_settings,
    open_finished,
)
from pyro_vae.runs.parsing import parse, parser, settings_text
from pyro_vae.runs.pushing import PushSettings, push_to_hub
from pyro_vae.runs.reporting import ReportSettings, report
from pyro_vae.runs.scoring import (
    best,
    number,
    reliable,
    report_run,
    score_test,
    some,
    some_images,
)
from pyro_vae.runs.searching import Search, SearchSettings, run_search, search
from pyro_vae.runs.settings import (
    EvaluationSettings,
    EvidenceSettings,
    Settings,
    TopSettings,
    check_numbers,
    check_seed,
)
from pyro_vae.runs.studies import Study, StudySettings, report_study, run_study, slug, study
from pyro_vae.runs.summaries import (
    Summary,
    difference,
    estimators,
    forest,
    load_study,
    standard_error,
    summarize,
    summary_table,
    write_study,
)
from pyro_vae.runs.training import compiled_engine, train
from pyro_vae.runs.using import Filled, Using

__all__ = [
    "ClassificationSettings",
    "Classified",
    "Comparison",
    "ComparisonSettings",
    "Difference",
    "EvaluationSettings",
    "EvidenceSettings",
    "ExploreSettings",
    "ExportSettings",
    "Exported",
    "Filled",
    "Finished",
    "PushSettings",
    "ReportSettings",
    "Run",
    "RunError",
    "Scored",
    "Search",
    "SearchSettings",
    "Settings",
    "Study",
    "StudySettings",
    "Summary",
    "TopSettings",
    "Using",
    "annealed_alike",
    "best",
    "build",
    "card",
    "check_empty",
    "check_numbers",
    "check_run_dir",
    "check_seed",
    "choose_device",
    "classification_table",
    "classify",
    "compare",
    "compiled_engine",
    "conclude",
    "difference",
    "difference_of",
    "estimators",
    "evaluate",
    "evaluation_table",
    "explore",
    "export",
    "figures",
    "forest",
    "images_of",
    "judge",
    "load",
    "load_data",
    "load_dataset",
    "load_finished",
    "load_model",
    "load_settings",
    "load_study",
    "make",
    "make_directory",
    "number",
    "open_finished",
    "open_run",
    "parse",
    "parser",
    "provenance",
    "push_to_hub",
    "reliable",
    "report",
    "report_run",
    "report_study",
    "run_classification",
    "run_dir_for",
    "run_search",
    "run_study",
    "score",
    "score_test",
    "search",
    "settings_text",
    "slug",
    "some",
    "some_images",
    "standard_error",
    "study",
    "summarize",
    "summary_table",
    "table",
    "train",
    "without_class",
    "write_csv",
    "write_evidence",
    "write_json",
    "write_study",
    "write_text",
    "write_weights",
    "writing",
]
