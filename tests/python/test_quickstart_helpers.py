"""The Python helpers of deploy/quickstart.sh: the chat prompt, the streaming text, the wait for a server."""

import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest
from transformers import AutoTokenizer

HELPERS = pathlib.Path(__file__).parents[2] / "deploy/quickstart"
CACHE = pathlib.Path(os.environ.get("HEADSTART_CACHE", pathlib.Path.home() / ".cache/headstart"))
SMOLLM2 = CACHE / "models/SmolLM2-135M-Instruct"


def run(script, *arguments, **options):
    return subprocess.run([sys.executable, HELPERS / script, *arguments], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMOLLM2)


def test_the_prompt_is_what_transformers_makes_of_the_chat(tmp_path, tokenizer):
    (tmp_path / "text").write_text("Ärger & 42\n")
    done = run("make_prompt.py", SMOLLM2, tmp_path / "text", "Why?", check=True)
    chat = [{"role": "user", "content": "Ärger & 42\n\n\nWhy?"}]
    assert json.loads(done.stdout) == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert done.stderr == ""


def test_a_text_that_is_too_long_is_cut_and_the_question_kept(tmp_path, tokenizer):
    (tmp_path / "text").write_text("word " * 20000)
    done = run("make_prompt.py", SMOLLM2, tmp_path / "text", "Why?", check=True)
    ids = json.loads(done.stdout)
    assert 8192 - 200 < len(ids) < 8192 - 100
    assert "Why?<|im_end|>" in tokenizer.decode(ids)
    assert "20001 tokens" in done.stderr


def test_text_comes_token_by_token_and_whole_characters_only(tokenizer):
    text = "déjà vu 🎉 done"
    ids = tokenizer(text).input_ids
    reader = subprocess.Popen(
        [sys.executable, HELPERS / "print_text.py", SMOLLM2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    shown = b""
    for end, token in enumerate(ids, 1):
        reader.stdin.write(f"{token}\n".encode())
        wanted = tokenizer.decode(ids[:end])
        if wanted.endswith("\ufffd"):
            continue  # nothing more may come yet
        while shown != wanted.encode():
            shown += reader.stdout.read(1)
            assert wanted.encode().startswith(shown)
    reader.stdin.close()
    assert (shown + reader.stdout.read()).decode() == text + "\n"
    assert reader.wait() == 0


class Ready(http.server.BaseHTTPRequestHandler):
    """503 once, then 200."""

    asked = 0

    def do_GET(self):
        Ready.asked += 1
        self.send_response(503 if Ready.asked == 1 else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_waits_until_the_server_is_ready(tmp_path):
    admin = http.server.HTTPServer(("127.0.0.1", 0), Ready)
    threading.Thread(target=admin.serve_forever, daemon=True).start()
    ports = tmp_path / "ports.json"
    ports.write_text(json.dumps({"port": 1234, "admin_port": admin.server_port}))
    done = run("wait_ready.py", ports, str(os.getpid()), timeout=30, check=True)
    admin.shutdown()
    assert done.stdout == f"127.0.0.1:1234 http://127.0.0.1:{admin.server_port}\n"
    assert Ready.asked == 2


def test_gives_up_when_the_server_ends(tmp_path):
    ended = subprocess.Popen(["true"])
    ended_but_not_waited_for = str(ended.pid)
    done = run("wait_ready.py", tmp_path / "ports.json", ended_but_not_waited_for, timeout=30)
    assert done.returncode != 0
    assert "the server ended" in done.stderr
    ended.wait()
