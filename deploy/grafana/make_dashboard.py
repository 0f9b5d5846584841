#!/usr/bin/env python3
"""Writes headstart.json, the Grafana dashboard: edit the panels here, run this, commit both."""

import json
import pathlib

HERE = pathlib.Path(__file__).resolve().parent
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24  # columns of Grafana's grid
POOLS = ['cluster=~"$cluster"', 'namespace=~"$namespace"', 'job=~"$job"']
RUNBOOK = "https://git.example.com/headstart/blob/main/deploy/RUNBOOK.md"  # as in ../prometheus/make_rules.py


def select(*matchers):
    return "{" + ",".join([*POOLS, 'instance=~"$instance"', *matchers]) + "}"


SELECT = select()
SELECT_POOLS = "{" + ",".join(POOLS) + "}"


def rate(metric, *matchers):
    return f"rate({metric}{select(*matchers)}[$__rate_interval])"


def total(metric, by="", *matchers):
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} ({rate(metric, *matchers)})"


def quantile(q, histogram):
    return f"histogram_quantile({q}, {total(histogram + '_bucket', 'le')})"


def share(part, whole):
    return f"{part} / {whole}"


def mean(histogram, by=""):
    return share(total(histogram + "_sum", by), total(histogram + "_count", by))


def quantiles(histogram):
    return [(quantile(q, histogram), name) for q, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))]


def panel(title, description, unit, queries, kind="timeseries", width=8, **options):
    """queries: (expression, legend) pairs."""
    heatmap = kind == "heatmap"
    targets = [
        {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend,
         "editorMode": "code", "range": kind in ("timeseries", "heatmap"),
         "instant": kind not in ("timeseries", "heatmap"), "format": "heatmap" if heatmap else "time_series"}
        for index, (expr, legend) in enumerate(queries)
    ]
    custom = {"fillOpacity": options.get("fill", 10), "lineWidth": 1, "showPoints": "never"}
    if options.get("stack"):
        custom["stacking"] = {"mode": "normal", "group": "A"}
    defaults = {"unit": unit, "custom": custom if kind == "timeseries" else {}}
    for key in ("min", "max"):
        if key in options:
            defaults[key] = options[key]
    if "good_from" in options:
        defaults["thresholds"] = {"mode": "absolute", "steps": [{"color": "red", "value": None},
                                                                {"color": "green", "value": options["good_from"]}]}
    made = {
        "title": title, "description": description, "type": kind, "datasource": DATASOURCE, "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "gridPos": {"w": width, "h": options.get("height", 8)},
    }
    if kind == "timeseries":
        made["options"] = {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
                           "tooltip": {"mode": "multi", "sort": "desc"}}
    elif kind in ("stat", "bargauge"):
        made["options"] = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                           "orientation": "vertical" if kind == "bargauge" else "auto"}
    elif heatmap:
        made["options"] = {"calculate": False, "yAxis": {"unit": unit}, "cellGap": 0}
    return made


def service_level():
    ttft = "headstart_time_to_first_token_seconds"
    parts = {"queue": mean("headstart_queue_seconds")}
    parts |= {part: share(total(f"headstart_{part.replace(' ', '_')}_seconds_sum"), total(ttft + "_count"))
              for part in ("selection", "attention", "other compute", "gave way")}
    # What is left can't be summed up: exposed transfer is measured for every stream, also those of FetchKv.
    parts["room and shipping"] = f"clamp_min({' - '.join([mean(ttft), *parts.values()])}, 0)"
    decomposition = [(expr, part) for part, expr in parts.items()]
    return [
        panel("Ready", "Servers that take requests now, and all that are scraped: also those that load, or never get ready.", "none",
              [(f"sum(headstart_ready{SELECT})", "ready"), (f"count(headstart_ready{SELECT})", "servers")], "stat", 3, height=4),
        panel("Draining", "Servers that finish what they accepted and take nothing new.", "none",
              [(f"sum(headstart_draining{SELECT})", "draining")], "stat", 3, height=4),
        panel("Within the objective", "The service level that the burn-rate alerts watch, 99 %: valid requests whose first token came "
              "within the time that the servers promise for their length. Refused and given up ones count as missed.", "percentunit",
              [(share(total("headstart_requests_within_objective_total"), total("headstart_requests_valid_total")), "within")],
              "stat", 6, height=4, good_from=0.99),
        panel("Prompt tokens", "Tokens of prompts that ended well, computed or found in the prefix cache, per second.",
              "short", [(total("headstart_prompt_tokens_total"), "tokens/s")], "stat", 6, height=4),
        panel("Work that waits or runs", "Seconds of compute that the servers predict for all they have accepted, mean of a "
              "minute. The autoscalers add servers when this exceeds 2 s for each.", "s",
              [(f"sum(pool:headstart_drain_seconds:sum{SELECT_POOLS})", "to compute")], "stat", 6, height=4),
        panel("Time to first token", "From accepted to the first token on the wire.", "s", quantiles(ttft), min=0),
        panel("Where the time goes", "Mean time to first token, split into its parts: the queue (of all whose compute began), "
              "compute, giving way to others, and what is none of these: waits for room and, of KV that is not fetched, "
              "exposed transfer.", "s",
              decomposition, fill=60, stack=True, min=0),
        panel("Requests by result", "Requests that ended, by gRPC status code.", "reqps",
              [(total("headstart_requests_total", "code"), "{{code}}")], min=0),
        panel("Errors and refusals", "Share of requests that end with an error of the server, or are refused because "
              "queue or host memory is full or the deadline out of reach.", "percentunit",
              [(f"pool:headstart_server_errors:ratio_rate5m{SELECT_POOLS}", "{{namespace}} {{model}} errors"),
               (f"pool:headstart_refused:ratio_rate5m{SELECT_POOLS}", "{{namespace}} {{model}} refused")], min=0, max=1),
        panel("Error budget burn", "How fast the budget of missed requests is spent; 1 uses it up in a month, 14.4 in "
              "two days.", "none",
              [(f"pool:headstart_objective_missed:ratio_rate{window}{SELECT_POOLS} / 0.01", f"{{{{namespace}}}} {{{{model}}}} {window}")
               for window in ("5m", "1h", "6h", "3d")], min=0),
        panel("Saturation", "Accepted and not ended, as a share of what the server takes; at 1 it refuses.",
              "percentunit",
              [(share(f"sum(headstart_inflight_tokens{SELECT})", f"sum(headstart_queue_limit_tokens{SELECT})"), "tokens"),
               (share(f"sum(headstart_queue_requests{SELECT} + headstart_running_requests{SELECT})",
                      f"sum(headstart_queue_limit_requests{SELECT})"), "requests")], min=0),
        panel("Queue", "Requests that were accepted and wait, those that compute or ship, and those whose KV is kept to be "
              "fetched.", "none",
              [(f"sum(headstart_queue_requests{SELECT})", "waiting"),
               (f"sum(headstart_running_requests{SELECT} - headstart_kv_leases{SELECT})", "running"),
               (f"sum(headstart_kv_leases{SELECT})", "kept")], min=0),
        panel("Time in the queue", "From accepted to the start of compute.", "s",
              quantiles("headstart_queue_seconds"), min=0),
    ]


def scheduling():
    steps, error = "headstart_steps_total", "headstart_ttft_estimate_error_ratio"
    cached, evictions = select('state="cached"'), "headstart_kv_pool_evictions_total"
    refusals = ('code!="FAILED_PRECONDITION"', 'reason=~"QUEUE_FULL|HOST_MEMORY_FULL|DEADLINE_UNREACHABLE"')
    return [
        panel("Error of estimates", "How far the predicted time to first token was off, as a share of the real one. Admission "
              "goes by these predictions.", "percentunit",
              [(quantile(0.5, error), "median"), (quantile(0.95, error), "p95")], min=0),
        panel("Predicted drain", "Time that each server needs to compute all it has accepted, by its own prediction.", "s",
              [(f"sum by (instance) (headstart_predicted_drain_seconds{SELECT})", "{{instance}}")], min=0),
        panel("Refusals by reason", "Requests that were refused at once for want of room or of time.", "reqps",
              [(total("headstart_requests_total", "reason", *refusals), "{{reason}}")], min=0),
        panel("Requests in a step", "Pieces of prompts that went through the layers together, mean.", "none",
              [(share(total("headstart_step_pieces_total"), total(steps)), "pieces")], min=0),
        panel("Steps", "Ways through the layers; urgent ones run between two layers of a main one.", "ops",
              [(total(steps, "kind"), "{{kind}}")], min=0),
        panel("Gave way", "How long prompts had begun and others ran.", "s", quantiles("headstart_gave_way_seconds"), min=0),
        panel("Prefix hits", "Share of prompt tokens whose KV was found in the prefix cache.", "percentunit",
              [(share(total("headstart_prompt_tokens_total", "", 'source="prefix_cache"'),
                      total("headstart_prompt_tokens_total")), "found")], width=6, min=0, max=1),
        panel("Pages of the KV pool", "Used by requests that run, cached for prompts that begin alike, and free.", "none",
              [(f"sum by (state) (headstart_kv_pool_blocks{SELECT})", "{{state}}")], width=6, fill=60, stack=True,
              min=0),
        panel("Evictions", "Cached pages that were taken for other KV.", "ops",
              [(total(evictions, "instance"), "{{instance}}")], width=6, min=0),
        panel("Stay in the prefix cache", "How long a page that nobody uses can be found: cached pages by evictions a second.",
              "s", [(share(f"sum(headstart_kv_pool_blocks{cached})", total(evictions)), "stay")], width=6, min=0),
    ]


def sparsity():
    density = "headstart_attention_density_ratio"
    executed, causal, predicted = (f"headstart_attention_{blocks}_blocks_total"
                                   for blocks in ("executed", "causal", "predicted"))
    return [
        panel("Attention density", "Share of the causal attention blocks that ran, per request; 1 is dense.",
              "percentunit", [(mean(density), "mean"), *quantiles(density)], min=0, max=1),
        panel("Density of requests", "How the density is spread over requests.", "percentunit",
              [(total(density + "_bucket", "le"), "{{le}}")], "heatmap"),
        panel("Predicted against executed", "Share of the causal blocks that the heads' budgets ask for, and that ran. What "
              "runs beyond the prediction is the dense tail and dense fallbacks.", "percentunit",
              [(share(total(predicted), total(causal)), "predicted"), (share(total(executed), total(causal)), "executed")],
              min=0, max=1),
        panel("Density by layer", "Share of the causal blocks that ran, by layer, over the range of the dashboard.",
              "percentunit", [(share(f"sum by (layer) (increase({executed}{SELECT}[$__range]))",
                                     f"sum by (layer) (increase({causal}{SELECT}[$__range]))"), "{{layer}}")],
              "bargauge", 12, min=0, max=1),
        panel("Dense fallbacks", "Dense attention although sparse was asked for: whole prompts below the dense limit, "
              "or layers whose selection kept too much.", "ops",
              [(total("headstart_attention_fallback_total", "reason"), "{{reason}}")], width=12, min=0),
        panel("Share of selection", "Part of compute that is spent on choosing blocks: the price of sparsity.",
              "percentunit",
              [(share(total("headstart_selection_seconds_sum"), total("headstart_compute_seconds_sum")), "selection")],
              width=12, min=0),
        panel("Blocks run and saved", "Query-key blocks that ran, and that dense attention would have run beyond them.",
              "ops",
              [(total(executed), "run"), (f"{total(causal)} - {total(executed)}", "saved")],
              width=12, fill=60, stack=True, min=0),
    ]


def kv_shipping():
    in_use = select('state="used"')
    return [
        panel("KV sent", "Bytes of KV cache that went to decode nodes, by how many stripes a client fetches (1: also what "
              "Prefill ships).", "Bps", [(total("headstart_kv_bytes_sent_total", "stripes"), "{{stripes}}")], fill=60,
              stack=True, min=0),
        panel("Exposed transfer", "From the end of compute until the client's connection had taken the last KV, by stream.",
              "s", quantiles("headstart_exposed_transfer_seconds"), min=0),
        panel("KV sent before compute ended", "Share of a stream's KV that was hidden behind compute; 1 is all of it.",
              "percentunit", [(mean("headstart_kv_overlap_ratio"), "mean"), *quantiles("headstart_kv_overlap_ratio")],
              min=0, max=1),
        panel("Host memory for KV", "The window through which KV leaves: what is in use, and how much there is.", "bytes",
              [(f"sum by (instance) (headstart_host_kv_bytes{in_use})", "{{instance}} in use"),
               (f"sum by (instance) (headstart_host_kv_bytes{SELECT})", "{{instance}} in all")], min=0),
        panel("Requests without room", "Requests that do not compute now because the window is full of KV that nobody has "
              "taken.", "none", [(f"sum by (instance) (headstart_kv_room_waiting_requests{SELECT})", "{{instance}}")],
              min=0),
        panel("Waits for room", "How long requests waited for room in the window, of those that had to wait.", "s",
              quantiles("headstart_kv_room_wait_seconds"), min=0),
        panel("Detached KV", "Computed prompts whose KV is kept to be fetched, and streams that fetch now.", "none",
              [(f"sum(headstart_kv_leases{SELECT})", "kept"), (f"sum(headstart_kv_fetch_streams{SELECT})", "streams")],
              min=0),
        panel("Fetches by result", "FetchKv calls that ended, by gRPC status code, and those that went on where another had "
              "broken.", "reqps", [(total("headstart_kv_fetches_total", "code"), "{{code}}"),
                                   (total("headstart_kv_resumes_total"), "went on")], min=0),
        panel("Expired leases", "Share of the accepted requests whose KV was given up because nobody asked for it any more.",
              "percentunit", [(share(total("headstart_kv_leases_expired_total"),
                                     total("headstart_tickets_acquired_total")), "expired")], min=0),
        panel("Broken streams", "KV streams that ended before the last chunk, by reason.", "reqps",
              [(total("headstart_kv_transfer_failures_total", "reason"), "{{reason}}")], min=0),
        panel("Time to the first chunk", "From accepted to the first KV on the wire.", "s",
              quantiles("headstart_time_to_first_chunk_seconds"), min=0),
        panel("Connections", "Open gRPC connections, and connections that were closed at a limit.", "none",
              [(f"sum(headstart_connections{SELECT})", "open"),
               (total("headstart_connections_shed_total", "reason"), "closed per second: {{reason}}")], min=0),
    ]


def resources():
    return [
        panel("Memory", "Resident memory of each server.", "bytes",
              [(f"process_resident_memory_bytes{SELECT}", "{{instance}}")], min=0),
        panel("CPU", "CPUs that each server uses.", "none",
              [(rate("process_cpu_seconds_total"), "{{instance}}")], min=0),
        panel("File descriptors", "Share of the file descriptors in use; at 1 no connection is accepted.", "percentunit",
              [(f"process_open_fds{SELECT} / process_max_fds{SELECT}", "{{instance}}")], min=0, max=1),
        panel("KV pool", "Share of the KV pool's pages that requests use; cached pages are not used.", "percentunit",
              [(f"headstart_kv_cache_utilization_ratio{SELECT}", "{{instance}}")], min=0, max=1),
        panel("Layers per second", "Progress: zero with work at hand means that a server is stuck.", "ops",
              [(total("headstart_layers_done_total", "instance"), "{{instance}}")], min=0),
        panel("Versions", "Servers by version, backend and options, those that load included. More than one outside of a roll-out is "
              "a mistake.", "none", [(f"count by (version, backend, options_hash) (headstart_build_info{SELECT})",
                                      "{{version}} {{backend}} {{options_hash}}")], "stat"),
    ]


def place(rows):
    """Lays panels out from left to right, one titled row after the other, and numbers them."""
    panels, y = [], 0
    for title, members in rows:
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})
        x, line, y = 0, 0, y + 1
        for member in members:
            grid = member["gridPos"]
            if x + grid["w"] > WIDTH:
                x, line, y = 0, 0, y + line
            grid.update(x=x, y=y)
            x, line = x + grid["w"], max(line, grid["h"])
            panels.append(member)
        y += line
    for number, member in enumerate(panels, 1):
        member["id"] = number
    return panels


def variable(name, label, matchers):
    """Choices of a label. From a series that servers show from their start. All includes servers without that label."""
    query = f"label_values(headstart_ready{{{','.join(matchers)}}}, {name})"
    return {"name": name, "label": label, "type": "query", "datasource": DATASOURCE,
            "query": {"query": query, "refId": name}, "definition": query, "refresh": 2, "sort": 1,
            "includeAll": True, "allValue": ".*", "multi": True, "current": {"text": ["All"], "value": ["$__all"]}}


def roll_outs():
    """A mark where a version or options appear that were not there five minutes before."""
    servers = f"count by (version, options_hash) (headstart_build_info{SELECT_POOLS}"
    return {"name": "Roll-outs", "enable": True, "iconColor": "purple", "datasource": DATASOURCE, "titleFormat": "{{version}}",
            "textFormat": "options {{options_hash}}", "expr": f"{servers}) unless {servers} offset 5m)", "step": "60s"}


def dashboard():
    return {
        "uid": "headstart", "title": "Headstart", "tags": ["headstart", "prefill"], "schemaVersion": 39, "version": 1,
        "description": "Prefill servers: service level, scheduling, sparsity of attention, KV shipping, resources.",
        "editable": True, "graphTooltip": 1, "refresh": "30s", "timezone": "",
        "time": {"from": "now-1h", "to": "now"}, "annotations": {"list": [roll_outs()]},
        "links": [{"title": "Runbook", "type": "link", "url": RUNBOOK, "targetBlank": True, "icon": "doc"}],
        "templating": {"list": [
            {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus",
             "current": {}, "refresh": 1},
            variable("cluster", "Cluster", []),
            variable("namespace", "Namespace", POOLS[:1]),
            variable("job", "Job", POOLS[:2]),
            variable("instance", "Server", POOLS),
        ]},
        "panels": place([("Service level", service_level()), ("Many requests at once", scheduling()),
                         ("Sparsity", sparsity()), ("KV shipping", kv_shipping()), ("Resources", resources())]),
    }


if __name__ == "__main__":
    (HERE / "headstart.json").write_text(json.dumps(dashboard(), indent=1) + "\n")
