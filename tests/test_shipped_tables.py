"""The tables that ship fit the networks they were made of: a change of what is hashed would orphan them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.compress import rewrite
from autocompress.graph.builder import GraphBuilder
from autocompress.model.inventory import take_inventory
from autocompress.prediction.table import LatencyTable
from autocompress.tasks.cifar_models import CIFAR_MODELS
from tests import networks

TABLES = sorted((Path(__file__).parents[1] / "latency_tables").glob("*/*.csv"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_shipped_table_knows_resnet20(path: Path) -> None:
    base = rewrite(CIFAR_MODELS["resnet20"]())
    inventory = take_inventory(base, networks.images(2, 32))
    layout = GraphBuilder(base, networks.images(1, 32), inventory, path.stem).layout
    assert len(LatencyTable.load(path).of_network(layout.hash).networks) >= 100


def test_there_is_a_table_of_each_processor_engine() -> None:
    assert {path.stem for path in TABLES} == {"openvino", "onnxruntime"}
