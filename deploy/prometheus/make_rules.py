#!/usr/bin/env python3
"""Writes rules.yaml, recording and alerting rules for a plain Prometheus, and prometheusrule.yaml, the same as an object of the
Prometheus operator: edit here, run this, commit all three. Every alert has a section of its name in ../RUNBOOK.md.

A pool is the servers of one model in one job of one namespace; recorded series `pool:…` have one number for each. Apply the
rules once to a Prometheus, whatever the number of pools: applied twice, they record everything twice.
"""

import pathlib

import yaml

HERE = pathlib.Path(__file__).resolve().parent

JOB = "headstart"
# Where your pager can open the runbook; a section's name is added. Set it to where you keep this repository.
RUNBOOK = "https://git.example.com/headstart/blob/main/deploy/RUNBOOK.md#"
# The service level: this share of valid requests is answered within --objective-base + --objective-per-1k-tokens.
OBJECTIVE = 0.99
# A pool with fewer requests a second has no page: one slow prompt among four an hour is no outage.
FLOOR = "1 / 60"
# What tells pools apart. `cluster` is there where one Prometheus (Thanos, Mimir) sees several.
CLUSTER = "cluster, namespace, job"
POOL = f"{CLUSTER}, model"
# What tells servers apart, and what an operator needs to act on one.
SERVER = f"{CLUSTER}, instance, pod, node"
NAME = ("{{ if $labels.pod }}{{ $labels.namespace }}/{{ $labels.pod }} on {{ $labels.node }}"
        "{{ else }}{{ $labels.instance }}{{ end }}")
# Of the objects of Kubernetes.
CONTAINER = 'container="headstart"'
POD = "{{ $labels.namespace }}/{{ $labels.pod }}"

# Long window, short window, how many times faster than the budget lasts, for how long, severity. SRE workbook, table 5-8.
BURNS = [("1h", "5m", 14.4, "2m", "critical"), ("6h", "30m", 6, "15m", "critical"),
         ("1d", "2h", 3, "1h", "warning"), ("3d", "6h", 1, "3h", "warning")]
WINDOWS = ["5m", "30m", "1h", "2h", "6h", "1d", "3d"]


def total(series, window="5m", by=POOL):
    return f"sum by ({by}) (rate({series}[{window}]))"


def share(part, whole):
    return f"{part}\n  / {whole}"


def record(name, expr):
    return {"record": f"pool:headstart_{name}", "expr": expr}


def mean(histogram, window):
    return share(total(f"{histogram}_sum", window), total(f"{histogram}_count", window))


def p95(histogram):
    return f"histogram_quantile(0.95, sum by ({POOL}, le) (rate({histogram}_bucket[5m])))"


def requests(matchers):
    return total(f"headstart_requests_total{{{matchers}}}")


def objective_rules():
    valid, within = "headstart_requests_valid_total", "headstart_requests_within_objective_total"
    return ([record(f"objective_missed:ratio_rate{window}", f"1 - {share(total(within, window), total(valid, window))}")
             for window in WINDOWS]
            + [record(f"requests_valid:rate{window}", total(valid, window)) for window in ("1h", "6h", "30m")])


def recording_rules():
    """Each with why it is."""
    all_requests = total("headstart_requests_total")
    executed, causal = (f"headstart_attention_{kind}_blocks_total" for kind in ("executed", "causal"))
    return objective_rules() + [
        # Errors that are the server's own. Not a wrong request, nor a client that left, nor one that was late or refused.
        record("server_errors:ratio_rate5m",
               share(requests('reason=~"OUT_OF_MEMORY|ENGINE_LOST|NONFINITE_OUTPUT|INTERNAL"'), all_requests)),
        # Turned away at the door for want of capacity. (FAILED_PRECONDITION: what never fits.)
        record("refused:ratio_rate5m",
               share(requests('code!="FAILED_PRECONDITION",reason=~"QUEUE_FULL|DEADLINE_UNREACHABLE|HOST_MEMORY_FULL"'),
                     all_requests)),
        # Of these, those whose deadline was out of reach.
        record("deadline_unreachable:ratio_rate5m", share(requests('reason="DEADLINE_UNREACHABLE"'), all_requests)),
        # KV streams that broke, among those whose compute began.
        record("transfer_failures:ratio_rate5m",
               share(total('headstart_kv_transfer_failures_total{reason=~"CLIENT_CANCELLED|CLIENT_STALLED|DEADLINE_EXCEEDED"}'),
                     total("headstart_queue_seconds_count"))),
        # How long KV goes on leaving after compute, and what it is measured against.
        record("exposed_transfer_seconds:p95_5m", p95("headstart_exposed_transfer_seconds")),
        record("time_to_first_token_seconds:p95_5m", p95("headstart_time_to_first_token_seconds")),
        # Fetches of detached KV that did not bring all of their part.
        record("fetch_failures:ratio_rate5m",
               share(total('headstart_kv_fetches_total{code!="OK"}'), total("headstart_kv_fetches_total"))),
        # Accepted requests whose detached KV was given up. Ten minutes: a lease ends long after its request came.
        record("leases_expired:ratio_rate10m",
               share(total("headstart_kv_leases_expired_total", "10m"), total("headstart_tickets_acquired_total", "10m"))),
        # Share of attention blocks that ran, so that a long prompt counts for more than a short one; 1 is dense.
        record("attention_density:ratio_rate1h", share(total(executed, "1h"), total(causal, "1h"))),
        # How far predictions of the time to first token are off; 1: as much as it really took.
        record("ttft_estimate_error:p95_5m", p95("headstart_ttft_estimate_error_ratio")),
        # Share of prompt tokens whose KV was there.
        record("prefix_hit:ratio_rate1h",
               share(total('headstart_prompt_tokens_total{source="prefix_cache"}', "1h"),
                     total("headstart_prompt_tokens_total", "1h"))),
        # How long a page stays in the prefix cache when nobody uses it: as many as are there, by how many go a second.
        record("prefix_stay_seconds:avg1h",
               share(f'sum by ({CLUSTER}) (avg_over_time(headstart_kv_pool_blocks{{state="cached"}}[1h]))',
                     total("headstart_kv_pool_evictions_total", "1h", CLUSTER))),
        # Work that waits or runs, in seconds: the sum of what every server predicts for itself. What the autoscalers look at. A
        # server that has computed next to nothing predicts nothing; until then its queue stands for it, at 10 000 tokens a
        # second, which is what the scheduler goes by then, too. A minute's mean: no server starts for one long prompt.
        record("drain_seconds:sum",
               f"sum by ({POOL}) (avg_over_time(headstart_predicted_drain_seconds[1m])\n"
               "  or avg_over_time(headstart_queue_tokens[1m]) / 10000)"),
    ]


def alert(name, expr, wait, severity, summary, **labels):
    return {"alert": name, "expr": expr, "for": wait, "labels": {"severity": severity, **labels},
            "annotations": {"summary": summary, "runbook_url": RUNBOOK + name.lower()}}


def burn_alerts():
    def burns(window, factor):
        return f"pool:headstart_objective_missed:ratio_rate{window} > {factor} * {1 - OBJECTIVE:.2f}"

    def busy(long, severity):
        return f"\n  and pool:headstart_requests_valid:rate{long} > {FLOOR}" if severity == "critical" else ""

    return [alert("HeadstartErrorBudgetBurn", f"{burns(long, factor)}\n  and {burns(short, factor)}{busy(long, severity)}", wait,
                  severity, f"{{{{ $value | humanizePercentage }}}} of the requests of the last {long} to {{{{ $labels.model }}}} in "
                  f"{{{{ $labels.namespace }}}} missed the objective: {factor} times what the budget of a month allows.",
                  long=long, short=short)
            for long, short, factor, wait, severity in BURNS]


def request_alerts():
    percent = "{{ $value | humanizePercentage }}"
    where = "to {{ $labels.model }} in {{ $labels.namespace }}"
    return burn_alerts() + [
        alert("HeadstartErrorRatioHigh",
              f"pool:headstart_server_errors:ratio_rate5m > 0.05\n  and pool:headstart_requests_valid:rate30m > {FLOOR}", "5m",
              "critical", f"{percent} of requests {where} end with an error of the server itself."),
        alert("HeadstartRequestsRefused",
              "pool:headstart_refused:ratio_rate5m - pool:headstart_deadline_unreachable:ratio_rate5m > 0.01", "5m", "warning",
              f"{percent} of requests {where} are refused because queue or host memory is full."),
        alert("HeadstartMostRequestsRefused",
              f"pool:headstart_refused:ratio_rate5m > 0.2\n  and pool:headstart_requests_valid:rate30m > {FLOOR}", "5m",
              "critical", f"{percent} of requests {where} are refused for want of capacity."),
        alert("HeadstartDeadlinesUnreachable", "pool:headstart_deadline_unreachable:ratio_rate5m > 0.05", "10m", "warning",
              f"{percent} of requests {where} are refused at once because they could not be computed in time."),
        alert("HeadstartTrafficStopped",
              f"pool:headstart_requests_valid:rate30m == 0\n  and pool:headstart_requests_valid:rate30m offset 1h > {FLOOR}", "5m",
              "warning", f"No request {where} for half an hour, where there were many an hour before."),
        alert("HeadstartEstimatesOff", "pool:headstart_ttft_estimate_error:p95_5m > 1", "15m", "warning",
              f"One prediction in twenty of the time to first token is off by {percent} of it or more: requests {where} are "
              "accepted or refused wrongly."),
        alert("HeadstartPrefixCacheThrashes",
              "pool:headstart_prefix_hit:ratio_rate1h offset 7d - pool:headstart_prefix_hit:ratio_rate1h > 0.2\n"
              f"  and on ({CLUSTER}) pool:headstart_prefix_stay_seconds:avg1h < 60", "30m", "warning",
              f"The prefix cache finds {percent} of all prompt tokens {where} less than a week ago, and its pages go within a "
              "minute: it is too small for what comes."),
        alert("HeadstartTransferFailures", "pool:headstart_transfer_failures:ratio_rate5m > 0.05", "5m", "warning",
              f"{percent} of KV streams of requests {where} break before the last chunk."),
        alert("HeadstartExposedTransferHigh",
              "pool:headstart_exposed_transfer_seconds:p95_5m > 0.25 * pool:headstart_time_to_first_token_seconds:p95_5m", "10m",
              "warning", "One KV stream in twenty goes on for {{ $value | humanizeDuration }} or more after compute has ended: over "
              f"a quarter of the time to first token of requests {where}."),
        alert("HeadstartLeasesExpire", "pool:headstart_leases_expired:ratio_rate10m > 0.02", "5m", "warning",
              f"The detached KV of {percent} of requests {where} is given up when its lease ends: decode nodes do not fetch or "
              "release it."),
        alert("HeadstartFetchFailures", "pool:headstart_fetch_failures:ratio_rate5m > 0.05", "5m", "warning",
              f"{percent} of the fetches of detached KV of requests {where} break or find none."),
        alert("HeadstartDensityDrift",
              "abs(pool:headstart_attention_density:ratio_rate1h - pool:headstart_attention_density:ratio_rate1h offset 7d) > 0.15",
              "30m", "warning", f"The share of attention blocks that run for requests {where} moved by {percent} of all blocks "
              "against a week ago: prompts, options or the model changed."),
    ]


def certificate_alerts():
    left, which = "headstart_tls_certificate_not_after_seconds - time()", "The certificate ({{ $labels.certificate }})"
    ends = f"{which} of {NAME} ends in {{{{ $value | humanizeDuration }}}}"
    return [
        alert("HeadstartCertificateEndsSoon", f"{left} < 7 * 86400", "15m", "warning", f"{ends}."),
        alert("HeadstartCertificateEnds", f"{left} < 86400", "5m", "critical", f"{ends}; then nobody can connect."),
        alert("HeadstartCertificatesRefused",
              f'sum by ({SERVER}) (increase(headstart_tls_reloads_total{{result="rejected"}}[5m])) > 0', "10m", "warning",
              f"{NAME} finds certificate files that it can't use, and goes on with the last good ones."),
    ]


def server_alerts():
    percent = "{{ $value | humanizePercentage }}"
    return [
        alert("HeadstartQueueSaturated",
              "headstart_inflight_tokens / headstart_queue_limit_tokens > 0.9\n"
              "  or (headstart_queue_requests + headstart_running_requests) / headstart_queue_limit_requests > 0.9", "5m",
              "warning", f"{NAME} holds {percent} of what it takes; soon it refuses."),
        alert("HeadstartHostMemoryFull", f"sum by ({SERVER}) (avg_over_time(headstart_kv_room_waiting_requests[5m])) > 0.5", "5m",
              "warning", f'{NAME} does not compute {{{{ $value | printf "%.1f" }}}} requests, on average over five minutes, because '
              "its host memory is full of KV that nobody takes."),
        alert("HeadstartNonfiniteOutputs", f"sum by ({SERVER}) (increase(headstart_nonfinite_outputs_total[10m])) > 0", "0m",
              "critical", f"{NAME} computed NaN or infinity: its weights or its hardware are damaged."),
        alert("HeadstartStuck", "max_over_time(headstart_stuck[5m]) == 1", "0m", "warning",
              f"{NAME} runs a step in which no layer finishes; it is about to be restarted."),
        alert("HeadstartNotReady", "headstart_ready == 0 and headstart_draining == 0", "10m", "warning",
              f"{NAME} runs for ten minutes without becoming ready."),
        alert("HeadstartDrainTooShort",
              f"sum by ({SERVER}) (headstart_predicted_drain_seconds)\n"
              f"  + time() - sum by ({SERVER}) (headstart_drain_deadline_seconds > 0) > 0", "0m", "warning",
              f"{NAME} drains and will cut requests: it needs {{{{ $value | humanizeDuration }}}} more than its drain timeout."),
        alert("HeadstartFileDescriptorsLow",
              f"process_open_fds / process_max_fds > 0.8 and on ({SERVER}) headstart_build_info", "5m", "warning",
              f"{NAME} uses {percent} of its file descriptors; new connections will fail."),
        alert("HeadstartConnectionsShed", f"sum by ({SERVER}, reason) (rate(headstart_connections_shed_total[5m])) > 0", "10m",
              "warning", f"{NAME} closes {{{{ $value | printf \"%.2f\" }}}} connections a second at once: {{{{ $labels.reason }}}}."),
        *certificate_alerts(),
        alert("HeadstartTargetDown", f'up{{job="{JOB}"}} == 0', "10m", "warning", f"{NAME} can't be scraped."),
    ]


def pool_alerts():
    ready = f"sum by ({CLUSTER}) (headstart_ready)"
    up = f'up{{job="{JOB}"}}'

    def differ(label, series):
        return f"count by ({CLUSTER}) (count by ({CLUSTER}, {label}) ({series})) > 1"

    return [
        alert("HeadstartCapacityLow", f"{ready}\n  / count by ({CLUSTER}) ({up}) < 0.5", "5m", "critical",
              "Only {{ $value | humanizePercentage }} of the servers in {{ $labels.namespace }} take requests."),
        alert("HeadstartPoolGone",
              f"count by ({CLUSTER}) ({up} offset 1h == 1)\n  unless count by ({CLUSTER}) ({up} == 1)", "3m", "critical",
              "None of the {{ $value }} servers in {{ $labels.namespace }} of an hour ago is scraped."),
        alert("HeadstartAbsent", f"absent({up} == 1)", "3m", "critical", "No Headstart server is scraped successfully."),
        alert("HeadstartServersDiffer",
              "\n  or ".join(f'label_replace({differ(label, series)}, "label", "{label}", "", "")'
                             for label, series in (("version", "headstart_build_info"), ("options_hash", "headstart_build_info"),
                                                   ("model_hash", "headstart_model_info"))), "1h", "warning",
              "The servers in {{ $labels.namespace }} have {{ $value }} values of {{ $labels.label }}: what a prompt gets depends on "
              "the server."),
    ]


def cluster_alerts():
    """On what kube-state-metrics, the kubelet and dcgm-exporter say."""
    of_pod = "on (namespace, pod, container)"
    gpu = 'and on (Hostname) label_replace(headstart_build_info, "Hostname", "$1", "node", "(.+)")'
    return [
        alert("HeadstartCrashLoops",
              f'max_over_time(kube_pod_container_status_waiting_reason{{{CONTAINER},reason="CrashLoopBackOff"}}[5m]) == 1', "5m",
              "warning", f"{POD} ends again and again."),
        alert("HeadstartOutOfMemory",
              f"increase(kube_pod_container_status_restarts_total{{{CONTAINER}}}[10m]) > 0\n"
              f'  and {of_pod} kube_pod_container_status_last_terminated_reason{{{CONTAINER},reason="OOMKilled"}} == 1', "0m", "warning",
              f"{POD} was killed because it had more memory than its limit."),
        alert("HeadstartMemoryNearLimit",
              f"container_memory_working_set_bytes{{{CONTAINER}}}\n"
              f'  / {of_pod} kube_pod_container_resource_limits{{{CONTAINER},resource="memory"}} > 0.9', "10m", "warning",
              f"{POD} uses {{{{ $value | humanizePercentage }}}} of its memory limit."),
        alert("HeadstartPodPending",
              'kube_pod_status_phase{phase="Pending"} == 1\n'
              f'  and on (namespace, pod) kube_pod_container_info{{{CONTAINER}}}', "15m", "warning",
              f"{POD} waits for a node, its image or its volumes."),
        alert("HeadstartPodDoesNotEnd",
              "time() - kube_pod_deletion_timestamp > 60\n"
              f"  and on (namespace, pod) kube_pod_container_info{{{CONTAINER}}}", "1m", "warning",
              f"{POD} should have ended {{{{ $value | humanizeDuration }}}} ago."),
        alert("HeadstartGpuFault", f"(DCGM_FI_DEV_XID_ERRORS > 0 or DCGM_FI_DEV_ROW_REMAP_FAILURE > 0)\n  {gpu}", "0m", "critical",
              "GPU {{ $labels.gpu }} of {{ $labels.Hostname }}, a node with a server, reports a fault: XID or failed row remap, "
              "{{ $value }}."),
        alert("HeadstartGpuHot", f"DCGM_FI_DEV_GPU_TEMP > 85\n  {gpu}", "5m", "warning",
              "GPU {{ $labels.gpu }} of {{ $labels.Hostname }}, a node with a server, has {{ $value }} °C: it slows down."),
    ]


def groups():
    return [{"name": "headstart-recording", "interval": "30s", "rules": recording_rules()},
            {"name": "headstart-requests", "rules": request_alerts()},
            {"name": "headstart-servers", "rules": server_alerts() + pool_alerts()},
            {"name": "headstart-cluster", "rules": cluster_alerts()}]


def prometheus_rule():
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "headstart", "labels": {"app.kubernetes.io/name": "headstart"}},
        "spec": {"groups": groups()},
    }


def write(name, content):
    yaml.SafeDumper.ignore_aliases = lambda *_: True
    text = yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)
    (HERE / name).write_text(f"# Made by {pathlib.Path(__file__).name}: edit that.\n{text}")


if __name__ == "__main__":
    write("rules.yaml", {"groups": groups()})
    write("prometheusrule.yaml", prometheus_rule())
