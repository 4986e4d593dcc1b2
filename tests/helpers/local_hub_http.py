"""What a local Hub answers to each request."""

import base64
import json
import re
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from local_hub_store import Commit, File, HubError, Repo, git_hash, is_lfs


REPO = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
GIT = r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"


class Handler(BaseHTTPRequestHandler):
    hub: Any  # the LocalHub, set by a subclass
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query, self.body, self.user = parse_qs(url.query), self._read_body(), None
        try:
            self.user = self._find_user()
            self._refuse_as_told(url.path)
            for method, pattern, action in ROUTES:
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, url.path)):
                    values = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    with self.hub.lock:
                        status, headers, content = action(self, **values)
                    break
            else:
                self.hub.unknown.append(f"{self.command} {url.path}")
                raise HubError(404, "This Hub does not know what you ask for")
        except HubError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            status, headers = error.status, {**headers, "X-Error-Message": str(error)}
            content = json.dumps({"error": str(error)}).encode()
        self.hub.requests.append((f"{self.command} {self.path}", self.user, status))
        self._send(status, headers, content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _find_user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if (user := self.hub.users.get(given.removeprefix("Bearer "))) is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _refuse_as_told(self, path: str) -> None:
        is_commit = "/commit/" in path
        title = json.loads(self.body.split(b"\n")[0])["value"]["summary"] if is_commit else ""
        for failure in self.hub.failures:
            if failure.statuses and re.search(failure.pattern, f"{self.command} {path} {title}"):
                raise HubError(failure.statuses.pop(0), "The Hub fails as it was told to")

    def _repo(self, kind: str | None, name: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get((kind or "models", name))
        owner = name.split("/")[0]
        if repo is None or (repo.private and self.user != owner):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user != owner:
            raise HubError(403 if self.user else 401, f"You have no right to write to {name}")
        return repo

    # ---- Each returns status, headers and content

    def who_am_i(self) -> tuple[int, dict[str, str], bytes]:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return _json({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": token})

    def create_repo(self) -> tuple[int, dict[str, str], bytes]:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        asked = json.loads(self.body)
        kind, owner = f"{asked.get('type') or 'model'}s", asked.get("organization") or self.user
        if owner != self.user:
            raise HubError(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {owner}")
        name = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}", "name": name}
        if (kind, name) in self.hub.repos:
            return _json({**answer, "error": f"You already created this {kind[:-1]} repo"}, 409)
        self.hub.create(kind, name, asked.get("visibility") == "private")
        return _json(answer)

    def validate_card(self) -> tuple[int, dict[str, str], bytes]:
        self.hub.cards.append(json.loads(self.body)["content"])
        return _json({"errors": [], "warnings": []})

    def preupload(self, kind: str, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        commit = self._repo(kind, name, write=True).at(revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            path, mode = asked["path"], "lfs" if is_lfs(asked["path"], asked["size"]) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            answers.append({**answer, "oid": commit.files[path].etag} if path in commit.files else answer)
        return _json({"files": answers, "commitOid": commit.oid})

    def lfs_batch(self, kind: str | None, name: str) -> tuple[int, dict[str, str], bytes]:
        self._repo(kind, name, write=True)
        asked = json.loads(self.body)
        if "basic" not in asked["transfers"]:
            raise HubError(422, f"No transfer of {asked['transfers']} is served, only basic")
        answers = []
        for item in asked["objects"]:
            link = {"href": f"{self.hub.storage_url}/lfs/{item['oid']}?signature=s3cret", "header": {}}
            verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/verify", "header": {}}
            missing = not self.hub.has_object(item["oid"])
            answers.append({**item, **({"actions": {"upload": link, "verify": verify}} if missing else {})})
        return _json({"transfer": "basic", "objects": answers})

    def lfs_verify(self, name: str) -> tuple[int, dict[str, str], bytes]:
        self._repo(None, name, write=True)
        oid = json.loads(self.body)["oid"]
        if not self.hub.has_object(oid):
            raise HubError(404, f"{oid} was not uploaded")
        return _json({})

    def lfs_object(self, oid: str) -> tuple[int, dict[str, str], bytes]:
        """Storage beside the Hub: it knows no users, but signed links."""
        if self.query.get("signature") != ["s3cret"]:
            raise HubError(403, "The link is not signed")
        if self.command == "PUT":
            self.hub.put_object(oid, self.body)
            return 200, {"ETag": f'"{oid}"'}, b""
        if not self.hub.has_object(oid):
            raise HubError(501, "This file is in the xet store, which only a client with hf_xet reads")
        return self._send_part((self.hub.folder / "objects" / oid).read_bytes(), {"ETag": f'"{oid}"'})

    def xet_token(self, kind: str, name: str, right: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        self._repo(kind, name, write=right == "write").at(revision)
        url, expiry = f"local://{self.hub.folder / 'xet'}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expiry)}
        return _json({"casUrl": url, "accessToken": "xet", "exp": expiry}, headers=headers)

    def commit(self, kind: str, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        repo = self._repo(kind, name, write=True)
        if revision != "main":
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        for operation in operations:
            if operation["key"] == "file":
                operation["value"]["content"] = base64.b64decode(operation["value"]["content"])
        items = ((operation["key"], operation["value"]) for operation in operations)
        made = self.hub.commit(repo, header["value"], items)
        url = f"{self.hub.url}/{name}/commit/{made.oid}"
        return _json({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    def info(self, kind: str, name: str, revision: str | None = None) -> tuple[int, dict[str, str], bytes]:
        repo = self._repo(kind, name)
        commit = repo.at(revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        dates = {"lastModified": commit.date, "createdAt": repo.commits[0].date}
        about = {"id": name, "author": name.split("/")[0], "sha": commit.oid, "private": repo.private, **dates}
        return _json({**about, "disabled": False, "gated": False, "tags": [], "siblings": siblings})

    def commits(self, kind: str, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        repo = self._repo(kind, name)
        made = repo.commits[: repo.commits.index(repo.at(revision)) + 1]
        answers = [{"id": item.oid, "title": item.title, "message": "", "date": item.date} for item in reversed(made)]
        return _json([{**answer, "authors": []} for answer in answers])

    def tree(self, kind: str, name: str, revision: str, path: str | None) -> tuple[int, dict[str, str], bytes]:
        commit = self._repo(kind, name).at(revision)
        prefix = f"{path}/" if path else ""
        inside = [name for name in commit.files if name.startswith(prefix)]
        if not inside:
            raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        above = {str(folder) for name in inside for folder in PurePosixPath(name).parents}
        folders = sorted(folder for folder in above if folder.startswith(prefix) and folder != ".")
        entries = [_describe(commit, name) for name in [*folders, *inside]]
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        return _json(entries)

    def paths_info(self, kind: str, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        commit = self._repo(kind, name).at(revision)
        found = [_describe(commit, path.strip("/")) for path in parse_qs(self.body.decode())["paths"]]
        return _json([entry for entry in found if entry])

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        repo = self._repo(kind, name)
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if (file := commit.files.get(path)) is None:
            error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, {**headers, **error}, b"Entry not found"
        if file.sha256 is None:
            return self._send_part(self.hub.content(file), {**headers, "ETag": f'"{file.etag}"'})
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        if file.xet is not None:
            token = f"{self.hub.url}/api/{repo.kind}/{name}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": file.xet, "Link": f'<{token}>; rel="xet-auth"'}
        return 302, {**headers, "Location": f"{self.hub.storage_url}/lfs/{file.sha256}?signature=s3cret"}, b""

    def _send_part(self, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if not (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return 200, headers, content
        start, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        part = {"Content-Range": f"bytes {start}-{last}/{len(content)}"}
        return 206, {**headers, **part}, content[start : last + 1]


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode()


def _describe(commit: Commit, path: str) -> dict[str, Any] | None:
    """A file, or a folder, as listings show it."""
    file: File | None = commit.files.get(path)
    if file is None:
        is_folder = any(name.startswith(f"{path}/") for name in commit.files)
        return {"type": "directory", "oid": git_hash(path.encode()), "size": 0, "path": path} if is_folder else None
    entry = {"type": "file", "oid": file.blob, "size": file.size, "path": path}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    return {**entry, "xetHash": file.xet} if file.xet else entry


ROUTES: list[tuple[str, str, Callable[..., tuple[int, dict[str, str], bytes]]]] = [
    ("GET", "/api/whoami-v2", Handler.who_am_i),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("POST", f"/api/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"{GIT}[.]git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", "/(?P<name>[^/]+/[^/]+)[.]git/info/lfs/verify", Handler.lfs_verify),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_object),
    ("GET", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_object),
    ("GET", f"/api/{REPO}/xet-(?P<right>read|write)-token/{REVISION}", Handler.xet_token),
    ("POST", f"/api/{REPO}/commit/{REVISION}", Handler.commit),
    ("GET", f"/api/{REPO}(?:/revision/{REVISION})?", Handler.info),
    ("GET", f"/api/{REPO}/commits/{REVISION}", Handler.commits),
    ("GET", f"/api/{REPO}/tree/{REVISION}(?:/(?P<path>.+))?", Handler.tree),
    ("POST", f"/api/{REPO}/paths-info/{REVISION}", Handler.paths_info),
    ("GET", f"{GIT}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
