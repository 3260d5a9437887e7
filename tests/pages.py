"""What holds of every HTML page that the program writes; and a browser, where there is one, that opens them."""

import json
import os
import shutil
import subprocess
import time
from html.parser import HTMLParser

from minivlm.html import VOID

LOADS = {"src", "href", "srcset", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """Its text, tags with attributes, and ids. Raises where a tag is not closed, or something would be loaded."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(source)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        ids = [values["id"] for _, values in self.tags if "id" in values]
        assert len(ids) == len(set(ids)), "an id is given twice"
        wanted = {values[key] for _, values in self.tags for key in ("for", "aria-labelledby") if key in values}
        wanted |= {v["href"][1:] for _, v in self.tags if v.get("href", "").startswith("#")}
        assert wanted <= set(ids), f"no element has the ids {wanted - set(ids)}"
        assert "url(" not in source and "@import" not in source

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        assert len(values) == len(attributes), f"an attribute of {tag} is given twice"
        assert not any(name.startswith("on") for name in values), f"{tag} has a script in {values}"
        for name in LOADS & set(values):
            assert values[name].startswith(("data:image/", "#")), f"{tag} loads {values[name][:80]}"
        self.tags.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def count(self, tag, class_=None):
        return sum(t == tag and (class_ is None or class_ in v.get("class", "").split()) for t, v in self.tags)


def chromium():
    """The program, or None."""
    if os.name == "nt":
        return None
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def wait_for(happened):
    for _ in range(400):
        if happened():
            return
        time.sleep(0.05)
    raise AssertionError("it never happened")


class Browser:
    """Headless Chromium that is spoken to through a pipe, in the words of its debugging protocol."""

    def __init__(self, directory):
        ours, theirs = os.pipe(), os.pipe()
        command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
        command += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={directory / 'chrome'}", "about:blank"]

        def pipes():
            read, write = os.dup(ours[0]), os.dup(theirs[1])
            read, write = os.dup2(read, 13), os.dup2(write, 14)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.process = subprocess.Popen(command, preexec_fn=pipes, pass_fds=(3, 4), stderr=subprocess.DEVNULL)
        os.close(ours[0])
        os.close(theirs[1])
        self.write, self.read = os.fdopen(ours[1], "wb", 0), os.fdopen(theirs[0], "rb")
        self.number, self.session = 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method, **values):
        self.number += 1
        message = {"id": self.number, "method": method, "params": values}
        message |= {"sessionId": self.session} if self.session else {}
        self.write.write(json.dumps(message).encode() + b"\0")
        while True:
            text = b""
            while (letter := self.read.read(1)) != b"\0":
                assert letter, "the browser has ended"
                text += letter
            answer = json.loads(text)
            if answer.get("id") == self.number:
                if "navigated" in str(answer.get("error")):
                    return {"result": {}}  # the page that was asked has made room for the next one
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path):
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, script):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script):
        wait_for(lambda: self.value(script))

    def press(self, key):
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def close(self):
        self.write.close()
        self.read.close()
        self.process.terminate()
        self.process.wait(20)
