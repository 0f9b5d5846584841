"""What can be said about the Dockerfile without building it; image_test.sh builds it."""

import re
import subprocess

from manifests import OVERLAYS, REPO, container_of, pod_of, render

DOCKERFILE = (REPO / "deploy/Dockerfile").read_text()


def stages():
    """Stage name -> (what it starts from, its instructions)."""
    found = {}
    for part in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]:
        first, *rest = part.splitlines()
        base, name = re.fullmatch(r"(\S+) AS (\S+)", first).groups()
        found[name] = (base, [line for line in rest if line and not line.startswith("#")])
    return found


def instructions(name):
    """The instructions of a stage and of the stages of this file that it starts from."""
    base, own = stages()[name]
    return (instructions(base) if base in stages() else []) + own


FINAL = ("cpu", "cpu-demo", "cuda")


def test_final_stages_run_as_the_user_of_the_pods():
    security = pod_of(render("h100"))["spec"]["securityContext"]
    for name in FINAL:
        assert f"USER {security['runAsUser']}:{security['runAsGroup']}" in instructions(name)


def test_final_stages_start_what_the_pods_start():
    container = container_of(render("h100"))
    for name in FINAL:
        assert f"ENTRYPOINT {str(container['command'])}".replace("'", '"') in instructions(name)
        assert f"CMD {str(container['args'])}".replace("'", '"') in instructions(name)
        ports = " ".join(str(port["containerPort"]) for port in container["ports"])
        assert f"EXPOSE {ports}" in instructions(name)


def test_final_stages_install_only_what_the_program_links():
    for name in FINAL:
        installed = [line for line in instructions(name) if "install_packages.sh $(" in line]
        assert len(installed) == 1 and "$(cat /opt/image/runtime_packages)" in installed[0]


def test_every_overlay_runs_an_image_that_the_dockerfile_makes():
    for overlay in OVERLAYS:
        tag = container_of(render(overlay))["image"].rpartition(":")[2]
        assert re.sub(r"^[\d.]+-", "", tag) in FINAL


def test_images_say_their_version():
    """There is no git in the build's folder."""
    for name in ("cpu-build", "cuda-build"):
        lines = instructions(name)
        (build,) = [line for line in lines if "build.sh" in line and line.startswith("RUN")]
        assert "-DHEADSTART_VERSION=$VERSION" in build and lines.index("ARG VERSION=") < lines.index(build)
    for name in FINAL:
        (label,) = [line for line in instructions(name) if line.startswith("LABEL")]
        assert "org.opencontainers.image.version=$VERSION" in label and "org.opencontainers.image.revision=$REVISION" in label


def test_version_of_a_build(tmp_path):
    """Without git that of the project, or what is given; nothing that no label can hold."""
    def version(given):
        made = tmp_path / "version.cc"
        done = subprocess.run(["cmake", f"-DOUT={made}", f"-DSOURCE_DIR={tmp_path}", "-DPROJECT_VERSION=1.2.3", f"-DGIVEN={given}",
                               "-P", REPO / "server/version.cmake"], capture_output=True, text=True, check=False)
        return done.returncode, made.read_text() if made.exists() else ""

    assert 'kVersion = "1.2.3"' in version("")[1]
    assert 'kVersion = "1.3.0-5-gabc"' in version("1.3.0-5-gabc")[1]
    assert version("1.3 beta")[0] != 0


def test_copied_files_exist():
    for _, lines in stages().values():
        for line in lines:
            match = re.fullmatch(r"COPY (?!--from)(\S+) \S+", line)
            if match and match[1] != ".":
                assert (REPO / match[1]).exists(), line


def test_build_needs_no_python(tmp_path):
    """None is among the packages of the build stage."""
    assert not [line for line in (REPO / "deploy/image/build_packages").read_text().split() if "python" in line]
    options = re.search(r"^cmake -S .*-G Ninja (.*) \"\$@\"$", (REPO / "deploy/image/build.sh").read_text(), flags=re.MULTILINE)[1]
    done = subprocess.run(["cmake", "-S", REPO, "-B", tmp_path, "-G", "Ninja", *options.split(),
                           "-DCMAKE_DISABLE_FIND_PACKAGE_Python3=ON"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
