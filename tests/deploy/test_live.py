"""Dashboard, rules and autoscaler against a real server under a mixed load, scraped by a real Prometheus."""

import re
import socket
import subprocess
import sys
import time

import grpc
import pytest
from headstart.v1 import prefill_pb2 as pb

from live import Prometheus, Server, get, parse_metrics, wait_for
from load import LIMITS, LONG, Load, prompt, raw_call
from manifests import REPO
from promql import adapter_query, autoscaler_query, dashboard_expressions, rules, run_promtool, substitute
from tiny_model import write_tiny_model

# Whose client may read as slowly as a busy machine lets it.
PATIENT = [limit for limit in LIMITS if "stall" not in limit]
LOAD_SECONDS = 15
# Alerts that look for what is missing say nothing about a healthy system.
ABSENCE = {"HeadstartAbsent", "HeadstartPoolGone"}
# What kube-state-metrics, the kubelet and dcgm-exporter say is not here.
OF_SERVERS = rules("headstart-recording", "headstart-requests", "headstart-servers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", layers=8)


def tls_flags(folder):
    """Of a server with a certificate that it signed itself."""
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
                    "-subj", "/CN=localhost", "-keyout", folder / "tls.key", "-out", folder / "tls.crt"],
                   check=True, capture_output=True)
    return [f"--tls-cert={folder}/tls.crt", f"--tls-key={folder}/tls.key"]


class Observed:
    """What was seen of one load: the client's side, the server's side, and Prometheus."""


@pytest.fixture(scope="module")
def observed(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    seen = Observed()
    with Server(model, folder, "steady", *LIMITS) as steady, Server(model, folder, "leaving", *PATIENT) as leaving, \
            Server(model, folder, "secure", *tls_flags(folder)) as secure, \
            Prometheus({"headstart": steady.admin, "other": leaving.admin, "secure": secure.admin}, folder) as prometheus:
        seen.prometheus, seen.steady, seen.leaving = prometheus, steady, leaving
        load = Load(steady.target)
        time.sleep(LOAD_SECONDS)
        wait_for(lambda: met_everything(steady), "every kind of attention and fetch on a slow machine", timeout=120)
        seen.values = dashboard_values(prometheus)
        seen.drain_seconds = drain_while_scraped(leaving, prometheus)
        load.stop()
        seen.codes, seen.fetches_of_nothing = load.codes, load.fetches_of_nothing
        wait_for(lambda: steady.value("headstart_queue_requests") + steady.value("headstart_running_requests") == 0,
                 "idle")
        seen.metrics = steady.metrics()
        yield seen


def met_everything(server):
    """One prompt ran sparse, one fell back for each reason; KV was fetched on two streams, on one that broke and went on, when it
    was gone, and not at all; the prefix cache had something, and too little room; an estimate could be compared."""
    return (server.value("headstart_prompt_tokens_total", source="prefix_cache") > 0
            and server.value("headstart_kv_pool_evictions_total") > 0
            and server.value("headstart_ttft_estimate_error_ratio_count") > 0
            and server.value("headstart_kv_bytes_sent_total", stripes="2-4") > 0
            and server.value("headstart_kv_resumes_total") > 0
            and server.value("headstart_kv_fetches_total", code="NOT_FOUND") > 0
            and server.value("headstart_kv_leases_expired_total") > 0
            and server.value("headstart_attention_executed_blocks_total") <
            server.value("headstart_attention_causal_blocks_total")
            and server.value("headstart_attention_fallback_total", reason="density") > 0
            and server.value("headstart_attention_fallback_total", reason="below_dense_limit") > 0)


def dashboard_values(prometheus, patience=60):
    """What each panel shows once it has data; what stays empty for `patience` seconds of load stays empty. A rare event, such
    as a stall, need not have happened within the window of the first look."""
    values, limit = {}, time.monotonic() + patience
    while True:
        for name, expr in dashboard_expressions():
            values[name] = values.get(name) or prometheus.query(substitute(expr))
        if all(values.values()) or time.monotonic() > limit:
            return values
        time.sleep(1)


def drain_while_scraped(server, prometheus):
    """SIGTERM while a client reads slowly, until the server has gone; the time that took."""
    with grpc.insecure_channel(server.target) as channel:
        call = raw_call(channel, pb.PrefillRequest(token_ids=prompt(LONG)))
        next(call)
        server.terminate()
        start = time.monotonic()
        draining = f'headstart_draining{{instance="{server.admin}"}} == 1'
        wait_for(lambda: prometheus.query(draining), "draining is scraped")
        for _ in call:
            time.sleep(0.02)
    assert server.wait() == 0, server.log_text()
    return time.monotonic() - start


# ------------------------------------------------------------------------------------------------- shipped expressions


@pytest.mark.parametrize("name", [name for name, _ in dashboard_expressions()])
def test_dashboard_expression_returns_data(observed, name):
    assert observed.values[name], dict(dashboard_expressions())[name]


@pytest.mark.parametrize("record", [rule["record"] for rule in rules() if "record" in rule])
def test_recorded_series_has_data(observed, record):
    assert observed.prometheus.query(record)


def test_autoscaler_finds_the_number_of_its_namespace(observed):
    ((_, value),) = observed.prometheus.query(autoscaler_query())
    assert value >= 0
    assert len(observed.prometheus.query("pool:headstart_drain_seconds:sum")) == 3, "pools are told apart"


def test_adapter_of_the_hpa_finds_the_same_series(observed):
    labels, _ = observed.prometheus.query(adapter_query())[0]
    assert labels["namespace"] == "headstart"
    assert observed.prometheus.query(adapter_query()) == observed.prometheus.query(autoscaler_query("by (namespace) "))


def selectors(expr):
    """Series selectors of an expression: names, with their matchers."""
    return re.findall(r'(?:\w+:)?(?:headstart|process)_\w+(?::\w+)*(?:\{[^}]*\})?|\bup\{[^}]*\}', expr)


def alternatives(selector):
    """The selector once for each alternative of its regular expressions: `a=~"x|y"` gives a="x" and a="y"."""
    match = re.search(r'=~"([^"]*\|[^"]*)"', selector)
    if not match:
        return [selector]
    return [more for value in match[1].split("|")
            for more in alternatives(selector.replace(match[0], f'="{value}"', 1))]


@pytest.mark.parametrize("rule", OF_SERVERS, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_series_that_a_rule_names_exists(observed, rule):
    found = selectors(rule["expr"])
    assert found
    for selector in found:
        for one in alternatives(selector):
            assert observed.prometheus.query(f"last_over_time({one}[10m])"), one


def without_thresholds(expr):
    """An alert's expression without its comparisons: what is compared."""
    return re.sub(r"\s(?:>|<|==)\s[\d.]+(?:\s\*\s[\d.]+)?", "", re.sub(r" offset \w+", "", expr))


@pytest.mark.parametrize("alert", [rule for rule in OF_SERVERS if rule.get("alert", "HeadstartAbsent") not in ABSENCE],
                         ids=lambda alert: alert["alert"])
def test_what_an_alert_compares_has_data(observed, alert):
    assert observed.prometheus.query(without_thresholds(alert["expr"])), without_thresholds(alert["expr"])


def test_picture_of_the_main_panels_can_be_drawn(observed, tmp_path):
    picture = tmp_path / "dashboard.png"
    subprocess.run([sys.executable, REPO / "deploy/grafana/draw_dashboard.py", "--prometheus", observed.prometheus.url,
                    "--range", "20", "--window", "10", picture], check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------- what really happened


def test_load_met_everything_that_can_happen_to_a_request(observed):
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "CANCELLED", "DEADLINE_EXCEEDED",
            "RESOURCE_EXHAUSTED"} <= set(observed.codes), observed.codes


@pytest.mark.parametrize("code, reason", [("OK", "NONE"), ("INVALID_ARGUMENT", "INVALID_FIELD"),
                                          ("NOT_FOUND", "UNKNOWN_MODEL")])
def test_server_counts_what_its_clients_saw(observed, code, reason):
    counted = sum(value for name, labels, value in parse_metrics(observed.metrics)
                  if name == "headstart_requests_total" and labels["reason"] == reason)
    assert counted == observed.codes[code], observed.codes


def test_server_counts_fetches_by_how_they_ended(observed):
    counted = {labels["code"]: value for name, labels, value in parse_metrics(observed.metrics)
               if name == "headstart_kv_fetches_total"}
    assert counted["NOT_FOUND"] == observed.fetches_of_nothing > 0
    assert counted["OK"] > 0 and counted["CANCELLED"] > 0


def test_nothing_leaks(observed):
    values = {name: value for name, labels, value in parse_metrics(observed.metrics) if labels.get("state") != "free"}
    assert values["headstart_tickets_acquired_total"] == values["headstart_tickets_released_total"] > 0
    assert values["headstart_kv_pool_blocks_acquired_total"] == values["headstart_kv_pool_blocks_released_total"] > 0
    assert values["headstart_inflight_tokens"] == values["headstart_kv_lease_tokens"] == 0
    assert values["headstart_kv_leases"] == values["headstart_kv_fetch_streams"] == 0
    pool = {labels["state"]: value for name, labels, value in parse_metrics(observed.metrics)
            if name == "headstart_kv_pool_blocks"}
    assert pool["used"] == values["headstart_kv_cache_utilization_ratio"] == 0 < pool["cached"]
    assert values["headstart_predicted_drain_seconds"] == 0
    assert values["headstart_host_kv_bytes"] == values["headstart_kv_room_waiting_requests"] == 0


def test_parts_of_the_time_to_first_token_add_up(observed):
    sums = {name: value for name, _, value in parse_metrics(observed.metrics) if name.endswith("_seconds_sum")}
    # Queue time is counted for requests that fail later too, so the parts are compared without it.
    # Exposed transfer is counted for every stream, so it is left out, too.
    computed = sum(sums[f"headstart_{part}_seconds_sum"] for part in ("selection", "attention", "other_compute"))
    assert computed == pytest.approx(sums["headstart_compute_seconds_sum"], rel=1e-3)
    assert 0 < computed
    assert computed + sums["headstart_gave_way_seconds_sum"] <= sums["headstart_time_to_first_token_seconds_sum"]


def test_metrics_follow_prometheus_conventions(observed):
    assert run_promtool("check", "metrics", stdin=observed.metrics) == ""


def test_server_shows_the_metrics_of_its_table_and_no_others(observed):
    table = re.findall(r'"((?:headstart|process)_\w+)"', (REPO / "server/ops/metric_table.h").read_text())
    shown = re.findall(r"^# TYPE (\w+) ", observed.metrics, flags=re.MULTILINE)
    assert sorted(shown) == sorted(table)


def test_a_drained_server_is_seen_as_down(observed):
    down = wait_for(lambda: observed.prometheus.query('up{job="headstart"} == 0'), "up == 0")
    assert [labels["instance"] for labels, _ in down] == [observed.leaving.admin]
    assert not observed.prometheus.query('absent(up{job="headstart"} == 1)')
    print(f"drained in {observed.drain_seconds:.2f} s")


# -------------------------------------------------------------------------------------------------------- cardinality


def number_of_series(server):
    return len(parse_metrics(server.metrics()))


def attack_with_names(target, count):
    """Calls with a model name, request id, user agent and trace of their own."""
    request_ids = (f"id-{index}" for index in range(count))
    with grpc.insecure_channel(target) as channel:
        for begin in range(0, count, 100):
            calls = [raw_call(channel, pb.PrefillRequest(model=f"model-{index}", request_id=next(request_ids),
                                                         token_ids=[1]),
                              metadata=[("x-request-id", f"trace-{index}"), ("user-agent", f"agent-{index}")])
                     for index in range(begin, min(begin + 100, count))]
            assert {call.code() for call in calls} == {grpc.StatusCode.NOT_FOUND}


def attack_with_peers(target, count):
    """Connections from addresses of their own, each with an HTTP/2 preface."""
    host, port = target.split(":")
    for index in range(count):
        with socket.socket() as connection:
            connection.bind((f"127.1.{index // 250}.{1 + index % 250}", 0))
            connection.connect((host, int(port)))
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            assert connection.recv(1), "the server greets"


def test_clients_cannot_add_series(model, tmp_path):
    with Server(model, tmp_path) as server:
        before = number_of_series(server)
        attack_with_names(server.target, 10_000)
        attack_with_peers(server.target, 10_000)
        assert server.value("headstart_requests_total", code="NOT_FOUND") == 10_000
        assert server.value("headstart_connections_accepted_total") >= 10_000
        assert number_of_series(server) == before
        print(f"{before} series before and after")
        assert before < 1000
        assert get(f"http://{server.admin}/healthz")[0] == 200
