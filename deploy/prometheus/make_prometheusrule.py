#!/usr/bin/env python3
"""Writes prometheusrule.yaml, the rules of rules.yaml as an object of the Prometheus operator."""

import pathlib

import yaml

HERE = pathlib.Path(__file__).resolve().parent


def prometheus_rule():
    groups = yaml.safe_load((HERE / "rules.yaml").read_text())["groups"]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "headstart", "labels": {"app.kubernetes.io/name": "headstart"}},
        "spec": {"groups": groups},
    }


if __name__ == "__main__":
    text = yaml.safe_dump(prometheus_rule(), sort_keys=False, width=120)
    (HERE / "prometheusrule.yaml").write_text(f"# Made by {pathlib.Path(__file__).name} from rules.yaml.\n{text}")
