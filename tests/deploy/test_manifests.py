"""What every rendered overlay must be: valid for Kubernetes, locked down, and able to drain."""

import os
import re

import jsonschema
import kubernetes_validate
import pytest
import yaml

from manifests import (KUBERNETES, OVERLAYS, REPO, container_of, crd_schema, environment_of, named, only, pod_of, render, seconds,
                       server_config)

KUBERNETES_VERSION = "1.37"
GPU_OVERLAYS = [name for name in OVERLAYS if name != "cpu-demo"]


@pytest.fixture(params=OVERLAYS)
def objects(request):
    return render(request.param)


def test_all_overlays_are_here():
    assert {"cpu-demo", "h100", "monitoring", "autoscaling"} <= set(OVERLAYS)


@pytest.mark.parametrize("name", ["base", *OVERLAYS])
def test_every_object_passes_its_strict_schema(name):
    for doc in render(name):
        schema = crd_schema(doc["kind"])
        if schema:
            jsonschema.Draft202012Validator(schema).validate(doc)
        else:
            kubernetes_validate.validate(doc, KUBERNETES_VERSION, strict=True)


def test_strict_schemas_refuse_a_misspelt_field():
    """The validation above can fail."""
    deployment = yaml.safe_load((KUBERNETES / "base/deployment.yaml").read_text())
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES_VERSION, strict=True)
    monitor = yaml.safe_load((KUBERNETES / "components/monitoring/pod-monitor.yaml").read_text())
    monitor["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(crd_schema("PodMonitor")).validate(monitor)


def test_everything_is_in_one_namespace_with_restricted_pods(objects):
    namespace = only(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for doc in objects:
        if doc is not namespace:
            assert doc["metadata"]["namespace"] == namespace["metadata"]["name"], doc["metadata"]["name"]


def test_pod_runs_without_privileges(objects):
    spec = pod_of(objects)["spec"]
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 65532
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
    assert not spec.get("initContainers")
    for container in spec["containers"]:
        own = container["securityContext"]
        assert own == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                       "capabilities": {"drop": ["ALL"]}}
        assert all("hostPort" not in port for port in container["ports"])


def test_pod_has_no_token_of_the_api_server(objects):
    spec = pod_of(objects)["spec"]
    account = only(objects, "ServiceAccount")
    assert spec["serviceAccountName"] == account["metadata"]["name"]
    assert spec["automountServiceAccountToken"] is False
    assert account["automountServiceAccountToken"] is False
    assert not [doc for doc in objects if "Role" in doc["kind"]]


def test_every_volume_is_mounted_read_only(objects):
    spec = pod_of(objects)["spec"]
    mounts = container_of(objects)["volumeMounts"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in spec["volumes"]}
    assert all(mount["readOnly"] for mount in mounts)
    # A subPath would never see a renewed certificate or config.
    assert not any("subPath" in mount for mount in mounts)


def test_probes_ask_the_admin_port(objects):
    container = container_of(objects)
    ports = {port["name"] for port in container["ports"]}
    paths = {}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[kind]
        assert probe["httpGet"]["port"] in ports
        assert probe["timeoutSeconds"] <= probe["periodSeconds"]
        paths[kind] = probe["httpGet"]["path"]
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}


def test_config_listens_where_ports_and_probes_are(objects):
    config = server_config(objects)
    ports = {port["name"]: port["containerPort"] for port in container_of(objects)["ports"]}
    assert config["listen"] == f"0.0.0.0:{ports['grpc']}"
    assert config["admin-listen"] == f"0.0.0.0:{ports['admin']}"


def test_clients_fetch_from_the_pod_that_has_the_kv(objects):
    container = container_of(objects)
    port = {port["name"]: port["containerPort"] for port in container["ports"]}["grpc"]
    assert environment_of(container, "10.9.8.7")["HEADSTART_FETCH_ADDRESS"] == f"10.9.8.7:{port}"


def test_config_and_model_lie_in_what_is_mounted(objects):
    mounts = {mount["name"]: mount["mountPath"] for mount in container_of(objects)["volumeMounts"]}
    assert container_of(objects)["args"] == ["serve", f"--config={mounts['config']}/server.toml"]
    config = server_config(objects)
    if "model" in mounts:
        assert config["model"].startswith(mounts["model"] + "/")
    for key in ("tls-cert", "tls-key", "tls-client-ca"):
        assert ("tls" in mounts) == (key in config)
        if key in config:
            assert config[key].startswith(mounts["tls"] + "/")


def test_cpu_demo_uses_the_threads_that_it_requests():
    objects = render("cpu-demo")
    assert str(server_config(objects)["threads"]) == container_of(objects)["resources"]["requests"]["cpu"]


def test_startup_probe_waits_for_a_large_model(objects):
    probe = container_of(objects)["startupProbe"]
    budget = probe["initialDelaySeconds"] + probe["periodSeconds"] * probe["failureThreshold"]
    assert budget >= 1200


def test_a_roll_out_is_given_the_time_that_a_load_may_take(objects):
    container, deployment = container_of(objects), only(objects, "Deployment")["spec"]
    probe = container["startupProbe"]
    load = probe["initialDelaySeconds"] + probe["periodSeconds"] * probe["failureThreshold"]
    # Its predecessor leaves first where there is no spare GPU.
    leaving = pod_of(objects)["spec"]["terminationGracePeriodSeconds"]
    assert deployment["progressDeadlineSeconds"] > load + leaving + deployment["minReadySeconds"]


def test_a_stuck_server_is_ended_without_a_drain(objects):
    grace = container_of(objects)["livenessProbe"]["terminationGracePeriodSeconds"]
    pre_stop = container_of(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pre_stop < grace < pod_of(objects)["spec"]["terminationGracePeriodSeconds"]


def test_objects_and_image_say_the_version(objects):
    version = re.search(r"project\(headstart VERSION ([\d.]+)", (REPO / "CMakeLists.txt").read_text())[1]
    deployment = only(objects, "Deployment")
    assert pod_of(objects)["metadata"]["labels"]["app.kubernetes.io/version"] == version
    assert "app.kubernetes.io/version" not in deployment["spec"]["selector"]["matchLabels"], "a selector can't change"
    tag = container_of(objects)["image"].rpartition(":")[2]
    assert tag.startswith(version) or tag == "cpu-demo"


def component(tmp_path, name, overlay="h100"):
    """The overlay with one component more."""
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": "headstart",
        "resources": [os.path.relpath(KUBERNETES / f"overlays/{overlay}", tmp_path)],
        "components": [os.path.relpath(KUBERNETES / f"components/{name}", tmp_path)]}))
    return render(tmp_path)


@pytest.mark.parametrize("name", ["model-claim", "model-image"])
def test_components_that_no_overlay_has_are_valid(tmp_path, name):
    for doc in component(tmp_path, name):
        kubernetes_validate.validate(doc, KUBERNETES_VERSION, strict=True)


def test_model_claim_can_be_read_on_every_node_and_is_filled_without_privileges(tmp_path):
    objects = component(tmp_path, "model-claim")
    claim, job = only(objects, "PersistentVolumeClaim"), only(objects, "Job")["spec"]["template"]["spec"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert named(pod_of(objects)["spec"]["volumes"], "model")["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert named(job["volumes"], "model")["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    # The namespace enforces the restricted standard.
    assert job["securityContext"]["runAsNonRoot"] is True and job["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    (container,) = job["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                            "capabilities": {"drop": ["ALL"]}}
    assert named(container["volumeMounts"], "model").get("readOnly") is None


def test_certificates_carry_the_names_that_clients_call(tmp_path):
    objects = component(tmp_path, "cert-manager")
    certificates = {doc["metadata"]["name"]: doc["spec"] for doc in objects if doc["kind"] == "Certificate"}
    issuers = {doc["metadata"]["name"] for doc in objects if doc["kind"] == "Issuer"}
    services = [f"{doc['metadata']['name']}.{doc['metadata']['namespace']}.svc" for doc in objects if doc["kind"] == "Service"]
    server = certificates["headstart-tls"]
    assert set(services) <= set(server["dnsNames"])
    assert server["secretName"] == named(pod_of(objects)["spec"]["volumes"], "tls")["secret"]["secretName"]
    for spec in certificates.values():
        assert spec["issuerRef"]["name"] in issuers
        # There is time between the first try to renew and the alert a week before the end.
        assert int(spec["renewBefore"][:-1]) > 14 * 24


def test_model_image_takes_the_place_of_the_claim(tmp_path):
    volume = named(pod_of(component(tmp_path, "model-image"))["spec"]["volumes"], "model")
    assert volume.keys() == {"name", "image"} and "@sha256:" in volume["image"]["reference"]


def test_pre_stop_and_drain_fit_into_the_grace_period(objects):
    pre_stop = container_of(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = pod_of(objects)["spec"]["terminationGracePeriodSeconds"]
    assert pre_stop >= 10, "clients and endpoints need time to learn that the pod leaves"
    drain = server_config(objects)["drain-timeout"]
    assert drain.endswith("s")
    assert pre_stop + int(drain[:-1]) + 10 <= grace


def test_selectors_find_the_pods(objects):
    labels = pod_of(objects)["metadata"]["labels"]
    selectors = [only(objects, "Deployment")["spec"]["selector"]["matchLabels"],
                 only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
                 only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]]
    selectors += [doc["spec"]["selector"] for doc in objects if doc["kind"] == "Service"]
    selectors += [doc["spec"]["selector"]["matchLabels"] for doc in objects if doc["kind"] == "PodMonitor"]
    selectors += [rule["labelSelector"]["matchLabels"]
                  for rule in pod_of(objects)["spec"]["topologySpreadConstraints"]]
    for selector in selectors:
        assert selector and selector.items() <= labels.items()


def test_no_router_draws_traffic_that_it_would_send_in_another_protocol(objects):
    assert not [label for label in pod_of(objects)["metadata"]["labels"] if label.startswith("llm-d.ai/")]


def test_pods_spread_over_nodes_and_zones(objects):
    keys = [rule["topologyKey"] for rule in pod_of(objects)["spec"]["topologySpreadConstraints"]]
    assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]


def test_one_pod_at_a_time_is_disrupted(objects):
    assert only(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_services_are_one_headless_and_one_with_an_address(objects):
    services = [doc for doc in objects if doc["kind"] == "Service"]
    assert sorted(doc["spec"].get("clusterIP", "own") for doc in services) == ["None", "own"]
    ports = {port["name"] for port in container_of(objects)["ports"]}
    for doc in services:
        assert doc["spec"].get("type", "ClusterIP") == "ClusterIP"
        # Metrics and probes are not offered to clients.
        assert [port["targetPort"] for port in doc["spec"]["ports"]] == ["grpc"]
        assert "grpc" in ports


def test_network_lets_in_clients_and_scrapes_and_out_dns(objects):
    policy = only(objects, "NetworkPolicy")["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    assert [[port["port"] for port in rule["ports"]] for rule in policy["ingress"]] == [["grpc"], ["admin"]]
    assert all(rule["from"] for rule in policy["ingress"]), "an empty list of peers is everyone"
    (egress,) = policy["egress"]
    assert sorted((port["protocol"], port["port"]) for port in egress["ports"]) == [("TCP", 53), ("UDP", 53)]
    # kustomize adds common labels to peers too, which would look for a name server among our own pods.
    assert egress["to"][0]["podSelector"]["matchLabels"] == {"k8s-app": "kube-dns"}


def test_memory_is_bounded_and_requested(objects):
    resources = container_of(objects)["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert "cpu" in resources["requests"] and "cpu" not in resources["limits"]


@pytest.mark.parametrize("overlay", GPU_OVERLAYS)
def test_gpu_overlays_ask_for_one_gpu(overlay):
    spec = pod_of(render(overlay))["spec"]
    assert spec["runtimeClassName"] == "nvidia"
    [term] = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    [products] = term["matchExpressions"]
    assert products["key"] == "nvidia.com/gpu.product"
    assert {"NVIDIA-H100-80GB-HBM3", "NVIDIA-H200"} <= set(products["values"]), "every GPU that the kernels are built for"
    assert container_of(render(overlay))["resources"]["limits"]["nvidia.com/gpu"] == "1"
    rolling = only(render(overlay), "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 0, "maxUnavailable": 1}, "there is no spare GPU for a surge"


@pytest.mark.parametrize("overlay", GPU_OVERLAYS)
def test_gpu_overlays_mount_model_and_certificates(overlay):
    volumes = pod_of(render(overlay))["spec"]["volumes"]
    assert named(volumes, "model")["persistentVolumeClaim"]["readOnly"] is True
    assert named(volumes, "tls")["secret"]["secretName"] == "headstart-tls"


def test_cpu_demo_needs_no_volume_of_the_cluster():
    assert [volume["name"] for volume in pod_of(render("cpu-demo"))["spec"]["volumes"]] == ["config"]


def test_no_overlay_runs_an_image_without_a_tag(objects):
    assert ":" in container_of(objects)["image"]
    assert not container_of(objects)["image"].endswith(":latest")


@pytest.mark.parametrize("overlay", ["autoscaling", "autoscaling-hpa"])
def test_clients_find_new_servers_soon(overlay):
    """gRPC clients resolve names again when a connection ends. A scale-up is no faster than that."""
    (age,) = [entry["value"] for entry in container_of(render(overlay))["env"] if entry["name"] == "HEADSTART_MAX_CONNECTION_AGE"]
    scaler = next(doc for doc in render(overlay) if doc["kind"] in ("ScaledObject", "HorizontalPodAutoscaler"))["spec"]
    behavior = scaler.get("behavior") or scaler["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert seconds(age) <= behavior["scaleUp"]["policies"][0]["periodSeconds"]


@pytest.mark.parametrize("overlay", ["autoscaling", "autoscaling-hpa"])
def test_servers_are_added_before_the_objective_is_missed(overlay):
    scaler = next(doc for doc in render(overlay) if doc["kind"] in ("ScaledObject", "HorizontalPodAutoscaler"))["spec"]
    target = (scaler["triggers"][0]["metadata"]["threshold"] if "triggers" in scaler
              else scaler["metrics"][0]["external"]["target"]["averageValue"])
    assert int(target) <= seconds(server_config(render(overlay))["objective-base"])


@pytest.mark.parametrize("overlay", ["autoscaling", "autoscaling-hpa"])
def test_the_autoscaler_owns_the_number_of_replicas(overlay):
    objects = render(overlay)
    assert "replicas" not in only(objects, "Deployment")["spec"]
    scalers = [doc for doc in objects if doc["kind"] in ("ScaledObject", "HorizontalPodAutoscaler")]
    assert len(scalers) == 1, "two autoscalers of one Deployment fight"
    target = scalers[0]["spec"]["scaleTargetRef"]
    assert target["name"] == only(objects, "Deployment")["metadata"]["name"]


def test_keda_and_hpa_ask_for_the_same():
    keda = only(render("autoscaling"), "ScaledObject")["spec"]
    hpa = only(render("autoscaling-hpa"), "HorizontalPodAutoscaler")["spec"]
    (trigger,), (metric,) = keda["triggers"], hpa["metrics"]
    assert trigger["metadata"]["threshold"] == metric["external"]["target"]["averageValue"]
    # The query is a sum over the recorded series, whose name without the recording's parts is the HPA's; the adapter adds the
    # namespace, KEDA does not.
    namespace = only(render("autoscaling"), "ScaledObject")["metadata"]["namespace"]
    assert trigger["metadata"]["query"] == (f'sum(pool:{metric["external"]["metric"]["name"]}:sum'
                                            f'{{job="headstart",namespace="{namespace}"}})')
    assert metric["external"]["metric"]["selector"]["matchLabels"] == {"job": "headstart"}
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert hpa["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300
