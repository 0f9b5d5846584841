"""A headless Chromium with one page, spoken to over pipes in the DevTools protocol; no driver, no port."""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time

# Debian's names; the shell is the browser without its windows.
PROGRAMS = ("chromium-headless-shell", "chromium")
# The browser reads commands from file descriptor 3 and writes answers to 4.
COMMANDS, ANSWERS = 3, 4
LIMIT_S = 60


def above_the_standard_ones(fd):
    """The same file under a number that the child may overwrite 3 and 4 without losing it."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved


class Page:
    """For as long as a `with` lasts. `requests`: every address that was asked for; `complaints`: errors and warnings of
    the console, exceptions."""

    def __init__(self, folder, width, height):
        program = next(filter(None, map(shutil.which, PROGRAMS)), None)
        assert program, f"none of {PROGRAMS} is installed: apt-get install {PROGRAMS[0]}"
        self.requests, self.complaints = [], []
        self._ids, self._answers, self._received = itertools.count(1), {}, b""
        commands, self._commands = map(above_the_standard_ones, os.pipe())
        self._events, answers = map(above_the_standard_ones, os.pipe())
        self._log = folder / "chromium.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server",
                 "--hide-scrollbars", f"--user-data-dir={folder}/chromium", "--remote-debugging-pipe", "about:blank"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(COMMANDS, ANSWERS),
                preexec_fn=lambda: (os.dup2(commands, COMMANDS), os.dup2(answers, ANSWERS)))
        os.close(commands)
        os.close(answers)
        try:
            self._session = None
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self.resize(width, height)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._events)

    def call(self, method, **parameters):
        """The result of a command of the protocol."""
        number = next(self._ids)
        command = {"id": number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        deadline = time.monotonic() + LIMIT_S
        while number not in self._answers:
            self._receive(deadline)
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def _receive(self, deadline):
        readable, _, _ = select.select([self._events], [], [], max(0, deadline - time.monotonic()))
        assert readable, f"Chromium does not answer: {self._log.read_text()}"
        chunk = os.read(self._events, 1 << 20)
        assert chunk, f"Chromium ended: {self._log.read_text()}"
        *messages, self._received = (self._received + chunk).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._note(message["method"], message["params"])

    def _note(self, event, said):
        if event == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif event == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(said["entry"])
        elif event == "Runtime.exceptionThrown" or event == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.complaints.append(said)

    def open(self, url):
        answer = self.call("Page.navigate", url=url)
        assert "errorText" not in answer, answer

    def resize(self, width, height, mobile=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def prefer(self, scheme):
        """`light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def value(self, expression):
        """Of an expression of JavaScript in the page; what it throws is an error here."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self):
        """PNG of what is in view."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
