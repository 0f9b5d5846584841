"""Recording and alerting rules: valid, each alert shown to fire and to stay quiet, each with a runbook section."""

import pathlib
import re

import pytest
import yaml

from manifests import REPO, only, pod_of, render
from promql import RULES, alerts, dashboard_panels, metric_names, rules, run_promtool

UNIT_TESTS = pathlib.Path(__file__).resolve().parent / "rules_test.yaml"
RUNBOOK = (REPO / "deploy/RUNBOOK.md").read_text()


def runbook_sections():
    """Heading -> text of the runbook's sections."""
    parts = re.split(r"^## (.+)$", RUNBOOK, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def unit_test_cases(alertname):
    """(fires, stays quiet): how many cases of each kind there are."""
    cases = [case for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"]
             for case in test.get("alert_rule_test", []) if case["alertname"] == alertname]
    fires = sum(bool(case["exp_alerts"]) for case in cases)
    return fires, len(cases) - fires


def test_rules_are_valid():
    assert f"{len(rules())} rules found" in run_promtool("check", "rules", RULES)


def test_rules_do_what_their_unit_tests_say():
    assert "SUCCESS" in run_promtool("test", "rules", UNIT_TESTS)


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_alert_has_a_firing_and_a_quiet_case(alert):
    fires, quiet = unit_test_cases(alert["alert"])
    assert fires >= 1 and quiet >= 1


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_alert_has_severity_summary_and_runbook(alert):
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert len(alert["annotations"]["summary"]) > 20
    assert alert["annotations"]["runbook_url"] == f"RUNBOOK.md#{alert['alert'].lower()}"


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_runbook_says_what_to_look_at_and_what_to_do(alert):
    text = runbook_sections()[alert["alert"]]
    for part in ("**Means.**", "**Look at.**", "**Do.**"):
        assert part in text


def test_runbook_has_no_section_of_a_forgotten_alert():
    written = {heading for heading in runbook_sections() if heading.startswith("Headstart")}
    assert written == {alert["alert"] for alert in alerts()}


def test_runbook_names_panels_that_exist():
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*\n]+)\*(?!\*)", RUNBOOK))
    titles = {panel["title"] for panel in dashboard_panels()}
    assert "Time to first token" in named
    assert named <= titles


def test_draining_is_too_long_when_the_pod_should_be_gone():
    grace = pod_of(render("monitoring"))["spec"]["terminationGracePeriodSeconds"]
    (alert,) = [rule for rule in alerts() if rule["alert"] == "HeadstartDrainsTooLong"]
    assert alert["for"] == f"{grace}s"


def test_recorded_series_that_rules_read_are_recorded():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for rule in rules() for name in metric_names(rule["expr"]) if ":" in name}
    assert used <= recorded


def test_object_of_the_operator_holds_the_same_rules():
    made = only(render("monitoring"), "PrometheusRule")["spec"]["groups"]
    assert made == yaml.safe_load(RULES.read_text())["groups"], "run deploy/prometheus/make_prometheusrule.py"
