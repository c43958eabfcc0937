"""A small Hub in this process: the routes that huggingface_hub asks when it makes a repository, sends a commit, and fetches one."""
import base64
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlparse


class FakeHub:
    """Answer as the Hub does; `files` holds what was sent, `asked` every request, `refuse` maps a word of a path to a status."""

    def __init__(self):
        self.files, self.variables, self.secrets, self.made, self.asked, self.refuse = {}, {}, {}, {}, [], {}
        self.stages = ["BUILDING", "RUNNING"]
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self): hub.answer(self)

            do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = _any

            def log_message(self, *args): pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, h):
        path = unquote(urlparse(h.path).path)
        body = h.rfile.read(int(h.headers.get("content-length") or 0))
        self.asked.append((h.command, path, h.headers.get("authorization"), body))
        code = next((c for word, c in self.refuse.items() if word in path), None)
        if code is not None: return self._send(h, code, {"error": "refused"})
        for method, pattern, reply in ROUTES:
            if method == h.command and (m := re.fullmatch(pattern, path)): return reply(self, h, body, *m.groups())
        self._send(h, 404, {"error": f"no route {h.command} {path}"})

    def _send(self, h, code, value, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        h.send_response(code)
        for k, v in {"content-type": "application/json", "content-length": str(len(data)), **{k.replace("_", "-"): v for k, v in headers.items()}}.items(): h.send_header(k, v)
        h.end_headers()
        if h.command != "HEAD": h.wfile.write(data)

    def create(self, h, body):
        d = json.loads(body)
        name = f"{d.get('organization') or 'me'}/{d['name']}"
        if name in self.made: return self._send(h, 409, {"error": "exists", "url": f"{self.url}/{name}"})
        self.made[name] = d
        self.files.setdefault(name, {})
        self._send(h, 200, {"url": f"{self.url}/{'spaces/' if d.get('type') == 'space' else ''}{name}", "name": name, "id": name})

    def preupload(self, h, body, kind, name, revision):
        self._send(h, 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})

    def commit(self, h, body, kind, name, revision):
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file": self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self._send(h, 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "hookOutput": ""})

    def info(self, h, body, kind, name, revision=None):
        if name not in self.files: return self._send(h, 404, {"error": "Repository not found"}, x_error_code="RepoNotFound")
        self._send(h, 200, {"id": name, "sha": "0" * 40, "private": False, "siblings": [{"rfilename": f} for f in self.files[name]]})

    def tree(self, h, body, kind, name, revision):
        if name not in self.files: return self._send(h, 404, {"error": "Repository not found"}, x_error_code="RepoNotFound")
        self._send(h, 200, [{"type": "file", "path": f, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for f, d in self.files[name].items()])

    def resolve(self, h, body, name, revision, file):
        data = self.files.get(name, {}).get(file)
        if data is None: return self._send(h, 404, {"error": "no file"}, x_error_code="EntryNotFound")
        self._send(h, 200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit="0" * 40)

    def setting(self, h, body, name, kind):
        d = json.loads(body)
        getattr(self, kind)[d["key"]] = d["value"]
        self._send(h, 200, {})

    def runtime(self, h, body, name, *_):
        stage = self.stages.pop(0) if len(self.stages) > 1 else self.stages[0]
        self._send(h, 200, {"stage": stage, "hardware": {"current": "cpu-basic", "requested": "cpu-basic"}, "storage": None, "gcTimeout": None})

    def fine(self, h, body, *_): self._send(h, 200, {"errors": [], "warnings": []})


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", FakeHub.create), ("POST", "/api/validate-yaml", FakeHub.fine),
    ("POST", rf"/api/(models|spaces)/{_REPO}/preupload/(\w+)", FakeHub.preupload), ("POST", rf"/api/(models|spaces)/{_REPO}/commit/(\w+)", FakeHub.commit),
    ("GET", rf"/api/(models|spaces)/{_REPO}", FakeHub.info), ("GET", rf"/api/(models|spaces)/{_REPO}/revision/(\w+)", FakeHub.info),
    ("GET", rf"/api/(models|spaces)/{_REPO}/tree/(\w+)", FakeHub.tree), ("GET", rf"/{_REPO}/resolve/(\w+)/(.+)", FakeHub.resolve), ("HEAD", rf"/{_REPO}/resolve/(\w+)/(.+)", FakeHub.resolve),
    ("POST", rf"/api/spaces/{_REPO}/(secrets|variables)", FakeHub.setting), ("POST", rf"/api/spaces/{_REPO}/restart", FakeHub.runtime), ("GET", rf"/api/spaces/{_REPO}/runtime", FakeHub.runtime)]
