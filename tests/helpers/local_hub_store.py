"""What a local Hub keeps: repositories, their commits and the content of files, in a folder."""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path


# What the Hub's own .gitattributes gives every new repository. Larger files are kept by LFS whatever their name.
LFS_NAMES = [
    "*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.ftz", "*.gz", "*.h5", "*.joblib", "*.lfs.*", "*.mlmodel",
    "*.model", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb", "*.pickle", "*.pkl", "*.pt",
    "*.pth", "*.rar", "*.safetensors", "*.tar.*", "*.tar", "*.tflite", "*.tgz", "*.wasm", "*.xz", "*.zip", "*.zst",
    "*tfevents*",
]  # fmt: skip
LARGE = 10 * 2**20
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


class HubError(Exception):
    """A request that the Hub refuses.

    Args:
        status: HTTP's.
        message: What the client shows.
        code: `X-Error-Code`, by which the client tells errors apart.
    """

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class File:
    """A file of a commit: a git blob, or an LFS pointer if it has a `sha256`."""

    size: int
    blob: str
    sha256: str | None = None
    xet: str | None = None  # its hash in the xet store, if it is there and not among the LFS objects

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Commit:
    """A commit and all the files there are after it."""

    oid: str
    title: str
    date: str
    files: Mapping[str, File] = field(repr=False)
    changed: tuple[str, ...] = ()


@dataclass
class Repo:
    """A repository with one branch, `main`."""

    kind: str  # models or datasets
    id: str
    private: bool
    commits: list[Commit]

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        """The commit of `main`, or of its full hash."""
        for commit in reversed(self.commits):
            if revision in ("main", commit.oid):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size > LARGE or any(fnmatch(path.split("/")[-1], pattern) for pattern in LFS_NAMES)


class Store:
    """Repositories in memory, contents in `folder`.

    Args:
        folder: `blobs/` by git hash, `objects/` by SHA-256; `xet/` is written by the client's xet library.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.repos: dict[tuple[str, str], Repo] = {}
        for name in ("blobs", "objects", "xet"):
            (folder / name).mkdir(parents=True)

    def create(self, kind: str, name: str, private: bool) -> Repo:
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_NAMES)
        repo = Repo(kind, name, private, [])
        self.repos[kind, name] = repo
        self._add_commit(repo, "initial commit", {".gitattributes": self._put_blob(attributes.encode())})
        return repo

    def add_folder(self, kind: str, name: str, folder: Path) -> Repo:
        """A public repository with the files of a folder."""
        repo = self.create(kind, name, private=False)
        files = dict(repo.head.files)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            relative, content = str(path.relative_to(folder)), path.read_bytes()
            if is_lfs(relative, len(content)):
                sha256 = hashlib.sha256(content).hexdigest()
                self.put_object(sha256, content)
                files[relative] = self._point(sha256, len(content))
            else:
                files[relative] = self._put_blob(content)
        self._add_commit(repo, "Upload folder", files)
        return repo

    def commit(self, repo: Repo, header: Mapping[str, str], operations: Iterable[tuple[str, dict]]) -> Commit:
        """Apply the operations of one commit to the head, all or none.

        Raises:
            HubError: The parent has moved (412), an LFS object or a deleted path is not there.
        """
        parent = header.get("parentCommit")
        if parent is not None and not repo.head.oid.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.head.files)
        for key, value in operations:
            path = value["path"]
            if key == "file":
                files[path] = self._put_blob(value["content"])
            elif key == "lfsFile":
                files[path] = self._point(value["oid"], value.get("size"))
            elif key in ("deletedFile", "deletedFolder"):
                gone = [path] if key == "deletedFile" else [name for name in files if name.startswith(f"{path}/")]
                if not gone or any(name not in files for name in gone):
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {name: file for name, file in files.items() if name not in gone}
            else:
                raise HubError(400, f"Unknown operation: {key}")
        return self._add_commit(repo, header["summary"], files)

    def has_object(self, sha256: str) -> bool:
        return (self.folder / "objects" / sha256).exists()

    def put_object(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HubError(400, f"The content is not that of {sha256}")
        (self.folder / "objects" / sha256).write_bytes(content)

    def content(self, file: File) -> bytes:
        if file.xet is not None:
            raise HubError(501, "This file is in the xet store, which only a client with hf_xet reads")
        return (self.folder / ("objects" if file.sha256 else "blobs") / file.etag).read_bytes()

    def _add_commit(self, repo: Repo, title: str, files: Mapping[str, File]) -> Commit:
        before = repo.head.files if repo.commits else {}
        changed = sorted(path for path in {*before, *files} if before.get(path) != files.get(path))
        listing = json.dumps([repo.id, len(repo.commits), title, *((path, file.blob) for path, file in files.items())])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        commit = Commit(oid, title, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"), files, tuple(changed))
        repo.commits.append(commit)
        return commit

    def _put_blob(self, content: bytes) -> File:
        blob = git_hash(content)
        (self.folder / "blobs" / blob).write_bytes(content)
        return File(len(content), blob)

    def _point(self, sha256: str, size: int | None) -> File:
        """An LFS file whose content must have been uploaded before."""
        xet = None
        if self.has_object(sha256):
            size = (self.folder / "objects" / sha256).stat().st_size
        elif (xet := self._xet_hashes().get(sha256)) is None or size is None:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        return File(size, git_hash(POINTER.format(sha256, size).encode()), sha256, xet)

    def _xet_hashes(self) -> dict[str, str]:
        """SHA-256 to xet hash, of every file whose upload to the xet store is complete."""
        shards = (self.folder / "xet").rglob("shards/*.mdb")
        return {sha256: xet for shard in shards for sha256, xet in read_shard(shard.read_bytes())}


def read_shard(shard: bytes) -> Iterator[tuple[str, str]]:
    """(SHA-256, xet hash) of each file in a shard, the record by which xet's client finishes an upload.

    Records are 48 bytes. After one header, each file has a header (hash, flags, number of entries), its entries, as
    many verification records if flag 31 is set, and one with the SHA-256 if flag 30 is.
    """
    position = 48
    while (raw := shard[position : position + 32]) != b"\xff" * 32:
        flags, entries = struct.unpack_from("<II", shard, position + 32)
        position += 48 * (1 + entries * (2 if flags >> 31 else 1))
        if flags >> 30 & 1:
            yield _hex(shard[position : position + 32]), _hex(raw)
            position += 48


def _hex(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))
