"""The chart, rendered by Helm's own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "kevlarflow"
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))
RELEASE, NAMESPACE = "shop", "llm"

Document = dict[str, Any]


def example(name: str) -> Document:
    values: Document = yaml.safe_load((ROOT / "deploy" / "examples" / f"{name}.yaml").read_text())
    return values


def render(values: Document, release: str = RELEASE) -> list[Document]:
    """Every document that `helm install` would send, after the values were held against their schema. Raises
    helm_python.HelmError."""
    with helm_python.Chart.load(str(CHART)) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name=release, namespace=NAMESPACE)
    found = [
        doc for name, text in files.items() if name.endswith(".yaml") for doc in yaml.safe_load_all(text)
    ]
    return [doc for doc in found if doc]


def of_kind(documents: list[Document], kind: str) -> dict[str, Document]:
    return {doc["metadata"]["name"]: doc for doc in documents if doc["kind"] == kind}


def templates(documents: list[Document]) -> dict[str, Document]:
    """Pod templates by the name of what has them."""
    found = {name: doc["spec"]["template"] for name, doc in of_kind(documents, "StatefulSet").items()}
    for name, doc in of_kind(documents, "CronJob").items():
        found[name] = doc["spec"]["jobTemplate"]["spec"]["template"]
    return found
