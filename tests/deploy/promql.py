"""Every PromQL expression that Headstart ships: dashboard, rules, autoscalers."""

import json
import re
import shutil
import subprocess

import yaml

from manifests import REPO, only, render

DASHBOARD = REPO / "deploy/grafana/headstart.json"
ADAPTER_VALUES = REPO / "deploy/kubernetes/components/hpa/prometheus-adapter-values.yaml"
RULES = REPO / "deploy/prometheus/rules.yaml"


def promtool():
    found = shutil.which("promtool")
    assert found, "promtool is missing: apt-get install prometheus"
    return found


def run_promtool(*arguments, stdin=None):
    """Returns the output, or fails with it."""
    done = subprocess.run([promtool(), *map(str, arguments)], input=stdin, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def dashboard_panels():
    """The panels that draw something."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def substitute(expr, rate_interval="30s", range_="5m"):
    """What Grafana sends with every variable set to all."""
    for variable, value in (("$__rate_interval", rate_interval), ("$__range", range_),
                            ("$cluster", ".*"), ("$namespace", ".*"), ("$job", ".*"), ("$instance", ".*")):
        expr = expr.replace(variable, value)
    assert "$" not in expr, expr
    return expr


def dashboard_expressions():
    """(panel title and query, expression) pairs."""
    return [(f"{panel['title']}: {target['legendFormat']}", target["expr"])
            for panel in dashboard_panels() for target in panel["targets"]]


def rules(*groups):
    """Of these groups; of all without."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] if not groups or group["name"] in groups
            for rule in group["rules"]]


def alerts():
    return [rule for rule in rules() if "alert" in rule]


def autoscaler_query(grouping=""):
    """The query of KEDA's trigger; with a grouping of its sum."""
    (trigger,) = only(render("autoscaling"), "ScaledObject")["spec"]["triggers"]
    return trigger["metadata"]["query"].replace("sum(", f"sum {grouping}(", 1)


def adapter_query():
    """What prometheus-adapter sends for the HPA's metric: it puts the namespace of the HPA beside its labels."""
    hpa = only(render("autoscaling-hpa"), "HorizontalPodAutoscaler")
    metric = hpa["spec"]["metrics"][0]["external"]["metric"]
    labels = {"namespace": hpa["metadata"]["namespace"], **metric["selector"]["matchLabels"]}
    (rule,) = [rule for rule in yaml.safe_load(ADAPTER_VALUES.read_text())["rules"]["external"]
               if rule["name"]["as"] == metric["name"]]
    query = rule["metricsQuery"]
    for name, value in (("Series", rule["seriesQuery"]), ("GroupBy", "namespace"),
                        ("LabelMatchers", ",".join(f'{key}="{value}"' for key, value in labels.items()))):
        query = query.replace(f"<<.{name}>>", value)
    return query


def metric_names(expr):
    """Names of the series that an expression reads, recorded ones included."""
    bare = re.sub(r'"[^"]*"', "", expr)
    return set(re.findall(r"\b(?:\w+:)?(?:headstart|process)_\w+(?::\w+)*|\bup\b", bare))
