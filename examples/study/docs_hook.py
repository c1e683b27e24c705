"""For mkdocs: draws the figure of docs/explanation/study.md from the committed results when the site is built."""

import importlib.util
import io
import json
from pathlib import Path

from mkdocs.structure.files import File

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "bench" / "results" / "study-cpu.json"


def on_files(files, config):
    spec = importlib.util.spec_from_file_location("study", HERE / "run.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    image = io.BytesIO()
    study.plot(json.loads(RESULTS.read_text()), image)
    files.append(File.generated(config, "explanation/study.svg", content=image.getvalue()))
    return files
