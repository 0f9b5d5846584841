"""Recording and alerting rules: valid, each alert shown to fire and to stay quiet, each with a runbook section."""

import importlib.util
import math
import pathlib
import re

import pytest
import yaml

from manifests import OVERLAYS, REPO, container_of, only, render, seconds, server_config
from promql import RULES, alerts, dashboard_panels, metric_names, rules, run_promtool

UNIT_TESTS = sorted(pathlib.Path(__file__).resolve().parent.glob("rules*_test.yaml"))
RUNBOOK = (REPO / "deploy/RUNBOOK.md").read_text()


def runbook_sections():
    """Heading -> text of the runbook's sections."""
    parts = re.split(r"^## (.+)$", RUNBOOK, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def unit_test_cases(alertname):
    """(fires, stays quiet): how many cases of each kind there are."""
    cases = [case for path in UNIT_TESTS for test in yaml.safe_load(path.read_text())["tests"]
             for case in test.get("alert_rule_test", []) if case["alertname"] == alertname]
    fires = sum(bool(case["exp_alerts"]) for case in cases)
    return fires, len(cases) - fires


def test_rules_are_valid():
    assert f"{len(rules())} rules found" in run_promtool("check", "rules", RULES)


def test_rules_do_what_their_unit_tests_say():
    assert "SUCCESS" in run_promtool("test", "rules", *UNIT_TESTS)


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_alert_has_a_firing_and_a_quiet_case(alert):
    fires, quiet = unit_test_cases(alert["alert"])
    assert fires >= 1 and quiet >= 1


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_alert_has_severity_summary_and_runbook(alert):
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert len(alert["annotations"]["summary"]) > 20
    base, _, section = alert["annotations"]["runbook_url"].partition("#")
    assert section == alert["alert"].lower()
    # From a pager: a URL, and the same for all.
    assert base.startswith("https://") and base == alerts()[0]["annotations"]["runbook_url"].partition("#")[0]


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


# What ends by itself while it goes wrong, however bad it is: seconds that the condition can last at most in an overlay. Another
# alert's condition lasts until somebody acts.
LONGEST = {
    "HeadstartStuck": lambda objects: until_killed(container_of(objects)["livenessProbe"]),
    "HeadstartNotReady": lambda objects: until_killed(container_of(objects)["startupProbe"]),
    "HeadstartDrainTooShort": lambda objects: seconds(server_config(objects)["drain-timeout"]),
}


# What these look back at goes on happening: a look at files every minute, a restart after the other.
RECUR = {"HeadstartCertificatesRefused", "HeadstartCrashLoops", "HeadstartHostMemoryFull"}


def until_killed(probe):
    """From the first failure until the kubelet acts."""
    return probe.get("initialDelaySeconds", 0) + probe["periodSeconds"] * (probe["failureThreshold"] - 1)


def remembered(alert):
    """Seconds for which an expression that looks at what was keeps seeing it; None when it looks at what is."""
    spans = re.findall(r"(?:increase|max_over_time)\([^\[]*\[(\w+)\]", alert["expr"])
    spans += re.findall(r"up\{[^}]*\} offset (\w+)", alert["expr"])
    return min(map(seconds, spans), default=None)


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_alert_can_fire_before_its_condition_ends(alert, overlay):
    scrape = seconds(only(render("monitoring"), "PodMonitor")["spec"]["podMetricsEndpoints"][0]["interval"])
    evaluation = 30  # the operator's default
    longest = LONGEST[alert["alert"]](render(overlay)) if alert["alert"] in LONGEST else math.inf
    if remembered(alert) and alert["alert"] not in RECUR:
        assert scrape < longest, f"what {alert['alert']} looks for is over after {longest} s"
        longest = remembered(alert)
    assert scrape + evaluation + seconds(alert["for"]) < longest, f"{alert['alert']}: its condition lasts {longest} s"


def test_a_wait_as_long_as_a_load_would_be_noticed():
    """The test above can fail."""
    assert 45 + seconds("20m") > LONGEST["HeadstartNotReady"](render("h100"))


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_rule_keeps_pools_apart(rule):
    for labels in re.findall(r"\bby \(([^)]*)\)", rule["expr"]):
        assert {"cluster", "namespace", "job"} <= set(labels.split(", "))


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_alert_about_a_server_names_pod_and_node(alert):
    if "$labels.instance" in alert["annotations"]["summary"]:
        assert "$labels.pod" in alert["annotations"]["summary"] and "$labels.node" in alert["annotations"]["summary"]
        for labels in re.findall(r"\bby \(([^)]*)\)", alert["expr"]):
            assert {"instance", "pod", "node"} <= set(labels.split(", "))


def test_targets_have_pod_and_node():
    (endpoint,) = only(render("monitoring"), "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["relabelings"] == [{"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "node"}]


def test_rules_are_what_their_generator_writes(tmp_path):
    spec = importlib.util.spec_from_file_location("make_rules", REPO / "deploy/prometheus/make_rules.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert yaml.safe_load(RULES.read_text())["groups"] == made.groups(), "run deploy/prometheus/make_rules.py"


def test_recorded_series_that_rules_read_are_recorded():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for rule in rules() for name in metric_names(rule["expr"]) if ":" in name}
    assert used <= recorded


def test_object_of_the_operator_holds_the_same_rules():
    made = only(render("monitoring"), "PrometheusRule")["spec"]["groups"]
    assert made == yaml.safe_load(RULES.read_text())["groups"], "run deploy/prometheus/make_rules.py"
