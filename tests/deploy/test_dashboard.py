"""The dashboard as a file: whole, described, free of anything that belongs to one installation."""

import importlib.util
import itertools
import json

import pytest
import yaml

from manifests import REPO, render
from promql import (DASHBOARD, dashboard_expressions, dashboard_panels, metric_names, rules, run_promtool,
                    substitute)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dashboard_is_what_its_generator_writes():
    made = load(REPO / "deploy/grafana/make_dashboard.py").dashboard()
    assert json.loads(DASHBOARD.read_text()) == made, "run deploy/grafana/make_dashboard.py"


@pytest.mark.parametrize("panel", dashboard_panels(), ids=lambda panel: panel["title"])
def test_panel_has_unit_description_and_legends(panel):
    assert len(panel["description"]) > 20
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"] and all(target["legendFormat"] for target in panel["targets"])


@pytest.mark.parametrize("panel", dashboard_panels(), ids=lambda panel: panel["title"])
def test_panel_takes_data_source_and_servers_from_variables(panel):
    for target in [panel, *panel["targets"]]:
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        assert target["expr"].count('job=~"$job"') == target["expr"].count("{")


def test_rates_follow_the_scrape_interval():
    for name, expr in dashboard_expressions():
        for window in expr.split("[")[1:]:
            assert window.split("]")[0] in ("$__rate_interval", "$__range"), name


def test_every_expression_parses(tmp_path):
    recorded = [{"record": f"expr:{index}:parsed", "expr": substitute(expr)}
                for index, (_, expr) in enumerate(dashboard_expressions())]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    assert f"{len(recorded)} rules found" in run_promtool("check", "rules", path)


def test_recorded_series_are_recorded_by_the_rules():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for _, expr in dashboard_expressions() for name in metric_names(expr) if ":" in name}
    assert used and used <= recorded


def test_panels_do_not_overlap():
    cells = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        own = set(itertools.product(range(grid["x"], grid["x"] + grid["w"]),
                                    range(grid["y"], grid["y"] + grid["h"])))
        assert not own & cells, panel["title"]
        cells |= own


def test_rows_cover_what_operators_ask():
    rows = [panel["title"] for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] == "row"]
    assert rows == ["Service level", "Many requests at once", "Sparsity", "KV shipping", "Resources"]


def test_config_map_carries_the_dashboard_for_grafanas_sidecar():
    found = [doc for doc in render("monitoring")
             if doc["kind"] == "ConfigMap" and doc["metadata"]["name"] == "headstart-dashboard"]
    assert len(found) == 1
    assert found[0]["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found[0]["data"]["headstart.json"]) == json.loads(DASHBOARD.read_text())
