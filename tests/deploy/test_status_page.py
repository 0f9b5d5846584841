"""The status page of a real server in a headless Chromium."""

import json

import pytest
from headstart import Attention, PrefillClient
from headstart.v1 import prefill_pb2 as pb

import grpc
from chromium import Page
from live import Server, get, wait_for
from load import code_of, prompt, raw_call
from tiny_model import write_tiny_model

LAYERS, HEADS = 4, 4
NAME = "<b>tiny</b>&amp;"  # text, not markup
SPARSE = Attention(preset="fast", budget="own", gamma=0.1, floor_tokens=128, dense_below_tokens=512)
PROMPTS = 6
COLD, HOT = (0xee, 0xf3, 0xf8), (0x08, 0x51, 0x9c)  # of the light scheme


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Has computed two dense and two sparse prompts, lost the client of one, and keeps the KV of a last one."""
    folder = tmp_path_factory.mktemp("status")
    model = write_tiny_model(folder / "tiny", layers=LAYERS, heads=HEADS)
    with Server(model, folder, "server", f"--model-name={NAME}") as server:
        with PrefillClient(server.target) as client, grpc.insecure_channel(server.target) as channel:
            for turn in range(2):
                client.prefill(prompt(300, turn), attention="exact")
                client.prefill(prompt(4096, turn), attention=SPARSE)
            left = raw_call(channel, pb.PrefillRequest(token_ids=prompt(8192)))
            assert next(left).HasField("accepted")
            left.cancel()
            assert code_of(left) == "CANCELLED"
            kept = pb.PrefillRequest(token_ids=prompt(200), request_id="kept", detached=pb.DetachedKv())
            assert code_of(raw_call(channel, kept)) == "OK"
            wait_for(lambda: len(status(server)["prompts"]) == PROMPTS, "the last prompt")
        yield server


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    with Page(tmp_path_factory.mktemp("page"), 1280, 800) as page:
        page.prefer("light")
        page.open(f"http://{server.admin}/")
        wait_for(lambda: page.value("document.querySelectorAll('.prompt').length") == PROMPTS, "the bars")
        yield page


def status(server):
    code, text = get(f"http://{server.admin}/status.json")
    assert code == 200
    return json.loads(text)


def test_names_are_text(page):
    assert page.value("document.getElementById('model').textContent") == NAME
    assert page.value("document.getElementById('model').children.length") == 0
    assert page.value("document.getElementById('phase').textContent") == "serving"


def test_requests_that_are_in_are_rows(page):
    rows = page.value("[...document.querySelectorAll('#requests tr')].map(row => [...row.cells].map(cell => cell.textContent))")
    assert [row[:5] for row in rows] == [["kept", "200", "200", "0", "lease"]]


def test_bars_take_the_time_apart(page, server):
    """Every prompt is a bar; the parts of one that ended well add up to its time, on the scale of the longest."""
    heights = page.value("""[...document.querySelectorAll('.prompt')].map(bar => Object.fromEntries(
        [...bar.children].map(part => [part.getAttribute('class'), Number(part.getAttribute('height'))])))""")
    prompts = status(server)["prompts"]
    longest = max(p["total_seconds"] for p in prompts)
    for bar, seen in zip(heights, prompts, strict=True):
        assert sum(bar.values()) == pytest.approx(100 * seen["total_seconds"] / longest, abs=0.1)
        if seen["ttft_seconds"] is None:
            assert bar.keys() == {"failed"}
        else:
            assert bar == pytest.approx({part: 100 * time / longest for part, time in seen["ttft_seconds"].items()}, abs=0.1)
            assert bar["attention"] > 0
    assert sum(bar.keys() == {"failed"} for bar in heights) == 1


def pixels(page, canvas):
    """[row][column] of what a canvas shows, each [red, green, blue]."""
    return page.value(f"""(() => {{
        const canvas = document.getElementById('{canvas}');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return Array.from({{length: canvas.height}}, (_, y) => Array.from({{length: canvas.width}}, (_, x) =>
            [...data.slice(4 * (y * canvas.width + x), 4 * (y * canvas.width + x) + 3)]));
    }})()""")


def expect_ramp(shown, values):
    """Every pixel lies between the colours of 0 and 1 as far as its value says."""
    for pixels_of_row, values_of_row in zip(shown, values, strict=True):
        for pixel, value in zip(pixels_of_row, values_of_row, strict=True):
            assert pixel == pytest.approx([c + (h - c) * value for c, h in zip(COLD, HOT)], abs=1)


def test_heat_maps_show_layers_prompts_and_heads(page, server):
    seen = status(server)
    by_layer = list(zip(*(p["layer_density"] for p in seen["prompts"] if p["layer_density"])))
    assert len(by_layer) == LAYERS and len({value for row in by_layer for value in row}) > 1
    expect_ramp(pixels(page, "density"), by_layer)
    by_head = seen["head_budget"]["layers"]
    assert len(by_head) == LAYERS and {len(row) for row in by_head} == {HEADS}
    assert len({value for row in by_head for value in row}) > 1
    expect_ramp(pixels(page, "budget"), by_head)


def test_tiles_show_pages_and_host_memory(page, server):
    text = page.value("document.getElementById('tiles').textContent")
    pages = status(server)["pages"]
    assert f"0 of {pages['all']}" in text and "host memory" in text


def test_page_follows_the_server(page, server):
    with PrefillClient(server.target) as client:
        client.prefill(prompt(300, seed=300), attention="exact", request_id="late-comer")
    last = "(() => { const bars = document.querySelectorAll('.prompt'); bars[bars.length - 1].onclick(); return document.getElementById('bars-detail').textContent })()"
    wait_for(lambda: page.value(last).startswith("late-comer: 300 tokens, density 1"), "the next poll")


def test_fits_on_a_phone(page):
    page.resize(360, 780, mobile=True)
    assert page.value("document.documentElement.scrollWidth") <= 360
    page.resize(1280, 800)


def test_follows_the_scheme_of_the_system(page):
    def background():
        return page.value("getComputedStyle(document.body).backgroundColor")

    light, drawn_light = background(), pixels(page, "density")
    page.prefer("dark")
    assert background() != light
    wait_for(lambda: pixels(page, "density") != drawn_light, "the heat map in other colours")
    page.prefer("light")
    wait_for(lambda: pixels(page, "density") == drawn_light, "the heat map as it was")


def test_nothing_is_complained_about_and_nothing_comes_from_elsewhere(page, server):
    """The last one: it judges what all others did."""
    assert page.complaints == []
    assert f"http://{server.admin}/status.json" in page.requests
    assert [url for url in page.requests if not url.startswith((f"http://{server.admin}/", "data:"))] == []
