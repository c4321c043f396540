"""A source on the Hub: pinned to a commit, known by its headers through range requests, downloaded only to be merged.

All requests go through huggingface_hub's own client, so its endpoint (HF_ENDPOINT), proxies, retries and caches apply. The
token is passed per call, never set process-wide.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

from merge.checkpoint import (
    MAX_JSON,
    MODEL,
    Checkpoint,
    Layout,
    add_shard,
    check_config,
    header_length,
    load_json,
    missing_weights,
    open_shard,
    parse_header,
    weight_files,
)
from merge.download import download
from merge.errors import SourceError
from merge.files import blob_id
from merge.header_cache import HeaderCache
from merge.pickles import read_pickle
from merge.progress import progress
from merge.reference import ModelReference
from merge.tensors import TensorInfo
from merge.zip_layout import RandomAccess

Kind: TypeAlias = Literal["model", "dataset"]
# Most headers of a shard fit in the first request (a 7B model's have 12 kB each); the few that don't cost a second.
FIRST_RANGE = 64 * 1024
# A zip file's directory is at its end: about 100 bytes for each tensor.
LAST_RANGE = 64 * 1024
# Before each storage in a zip file stands a header of its own, padded to 64 bytes.
ENTRY_RANGE = 512
REQUESTS_AT_ONCE = 32
# How often something is asked for again after a failure that passes: a preview is not to wait for long.
RETRIES = 2


class Hub:
    """The Hub as a place to read models from. `endpoint` and `token` as in huggingface_hub; None means its defaults.

    One model is asked for once, however many recipes name it. With `cache`, a folder, the headers of a commit are asked for
    once in all runs, and which commit a revision means at most every `recent` seconds. Threads may share it.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | None = None,
        cache: Path | None = None,
        recent: float = 0.0,
    ) -> None:
        self._endpoint, self._token, self._folder, self._recent = endpoint, token, cache, recent
        self._opened: dict[tuple[ModelReference, Layout], Future[Checkpoint]] = {}
        self._lock = threading.Lock()
        # Models wait for their files, so the files have threads of their own.
        self._models, self._files = (ThreadPoolExecutor(REQUESTS_AT_ONCE) for _ in range(2))

    @cached_property
    def endpoint(self) -> str:
        """Its address. The client is imported for the first model that is on no disk, and not all of it: only its session."""
        from huggingface_hub import constants

        return self._endpoint or constants.ENDPOINT

    @cached_property
    def _cache(self) -> HeaderCache | None:
        return HeaderCache(self._folder, self.endpoint, self._token) if self._folder is not None else None

    def open(self, reference: ModelReference, layout: Layout = MODEL) -> Checkpoint:
        """The checkpoint at `reference`, from its headers, pinned to the commit its revision meant when it was first asked for."""
        return self.begin(reference, layout).result()

    def begin(self, reference: ModelReference, layout: Layout = MODEL) -> Future[Checkpoint]:
        """The same, which other threads ask for while this one goes on."""
        with self._lock:
            future = self._opened.get((reference, layout))
            if future is None:
                future = self._models.submit(lambda: self._known(reference, layout) or self._ask(reference, layout))
                self._opened[reference, layout] = future
            return future

    def _known(self, reference: ModelReference, layout: Layout) -> Checkpoint | None:
        """The checkpoint from the cache, if its revision still means the commit that is kept."""
        if self._cache is None:
            return None
        path, revision = reference.path, reference.revision
        commit = self._cache.commit(path, revision)
        if commit is None:
            return None
        if commit != revision and not self._cache.is_recent(path, revision, self._recent):
            if self._info(reference, {"expand": "sha"}).get("sha") != commit:
                return None
            self._cache.confirm(path, revision)
        return self._cache.get(reference.path, commit, layout, str(reference))

    def _info(self, reference: ModelReference, parameters: dict[str, str], kind: Kind = "model") -> dict[str, Any]:
        """What the Hub says of a repository at a revision. The client's own `model_info` makes objects of all of it, which
        takes longer than the request."""
        revision = f"/revision/{quote(reference.revision, safe='')}" if reference.revision else ""
        url = f"{self.endpoint}/api/{kind}s/{reference.path}{revision}"
        return load_json(self._request(str(reference), url, parameters=parameters, kind=kind)[1], str(reference))

    def _url(self, path: str, commit: str, file: str, kind: Kind = "model") -> str:
        """The address of a file. https://huggingface.co/docs/hub/models-downloading"""
        prefix = "datasets/" if kind == "dataset" else ""
        return f"{self.endpoint}/{prefix}{path}/resolve/{commit}/{quote(file)}"

    def _ask(self, reference: ModelReference, layout: Layout) -> Checkpoint:
        name = str(reference)
        info = self._info(reference, {"blobs": "true"})
        commit, listed = info.get("sha") or "", info.get("siblings") or []
        files = {file["rfilename"]: file.get("size") or 0 for file in listed if "/" not in file["rfilename"]}
        # Of a large file the blob is a pointer to it.
        plain = [file for file in listed if file["rfilename"] in files and file.get("blobId") and not file.get("lfs")]
        blob_ids = {file["rfilename"]: file["blobId"] for file in plain}
        check_config(files, layout, name, "repository")

        def small(file: str) -> Any:
            return load_json(self._small_file(reference.path, commit, file, files, blob_ids), f"{name}/{file}")

        config = small(layout.config)
        shards = weight_files(files, layout, small, name)
        license = (info.get("cardData") or {}).get("license")
        found = Checkpoint(
            key=f"{reference.path}@{commit}",
            name=name,
            config=config,
            tensors=self._headers(reference, commit, shards, files) if shards else None,
            files=files,
            commit=commit,
            sha256={file["rfilename"]: file["lfs"]["sha256"] for file in listed if file.get("lfs")},
            blob_ids=blob_ids,
            license=license if isinstance(license, str) else None,
            why_no_headers=None if shards else missing_weights(files),
            fingerprint=hashlib.sha256(f"{reference.path}@{commit}".encode()).hexdigest(),
        )
        if self._cache is not None:
            self._cache.put(reference.path, reference.revision, layout, found)
        return found

    def download(self, checkpoint: Checkpoint, files: Iterable[str]) -> Checkpoint:
        """The same checkpoint with `files` of it on this machine, in a folder beside the client's cache.

        A download that was cut off goes on where it stopped; what is not the repository's file is an error.
        """
        path, _, commit = checkpoint.key.rpartition("@")
        folder = _store() / path.replace("/", "--") / commit
        tensors = dict(checkpoint.tensors or {})
        wanted = sorted(set(files))
        total = sum(checkpoint.files.get(file, 0) for file in wanted)
        with progress(f"download of {path}", total) as shown:
            for file in wanted:
                self._fetch(checkpoint, file, folder / file, shown.advance)
                if file.endswith(".bin"):
                    shown_as = f"{path}/{file}"
                    tensors |= _placed(open_shard(folder / file, shown_as)[1], shown_as, file, tensors)
        return replace(checkpoint, folder=folder, tensors=tensors if checkpoint.tensors is not None else None)

    def placed(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same checkpoint with the place of every tensor, also where its files are pickles: in a zip file it stands before
        the tensor, so that each takes a small request of its own."""
        tensors = dict(checkpoint.tensors or {})
        files = sorted({info.file for info in tensors.values() if info.file is not None and info.start is None})
        if not files:
            return checkpoint
        path, _, commit = checkpoint.key.rpartition("@")

        def places(file: str) -> dict[str, TensorInfo]:
            shown, size = f"{path}/{file}", checkpoint.files[file]
            reader = self._reader(path, commit, file, size, ENTRY_RANGE)
            return _placed(read_pickle(RandomAccess(shown, size, reader), exact=True), shown, file, tensors)

        for part in list(self._files.map(places, files)):
            tensors |= part
        return replace(checkpoint, tensors=tensors)

    def fetch_range(self, checkpoint: Checkpoint, file: str, start: int, count: int, target: Path) -> None:
        """Bytes start..start+count of a file of the repository to `target`, gone on with where an earlier try stopped."""
        from huggingface_hub.utils._headers import build_hf_headers

        path, _, commit = checkpoint.key.rpartition("@")
        url = self._url(path, commit, file)
        with _readable(f"{path}/{file}", self.endpoint):
            download(
                url, build_hf_headers(token=self._token), target,
                size=count, checksum=None, advance=lambda count: None, offset=start,
            )  # fmt: skip

    def _fetch(self, checkpoint: Checkpoint, file: str, target: Path, advance: Callable[[int], None]) -> None:
        """One file of the repository to `target`: linked where the client's cache has it, else downloaded."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.utils._headers import build_hf_headers

        path, _, commit = checkpoint.key.rpartition("@")
        size, checksum = checkpoint.files.get(file, 0), checkpoint.sha256.get(file) or checkpoint.blob_ids.get(file)
        cached = try_to_load_from_cache(path, file, revision=commit)
        if not target.is_file() and isinstance(cached, str) and Path(cached).stat().st_size == size:
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                target.symlink_to(Path(cached).resolve())
        url = self._url(path, commit, file)
        with _readable(f"{path}/{file}", self.endpoint):
            download(url, build_hf_headers(token=self._token), target, size=size, checksum=checksum, advance=advance)

    def _small_file(self, path: str, commit: str, file: str, files: dict[str, int], blob_ids: dict[str, str]) -> bytes:
        """A JSON file, as the Hub has it."""
        if files[file] > MAX_JSON:
            raise SourceError(f"{path}/{file}: larger than any {file} we read ({files[file]} bytes)")
        data = self._get(path, commit, file, {})[1]
        if blob_ids.get(file, known := blob_id(data)) != known:
            raise SourceError(f"{path}/{file}: what came is not the file on the Hub (checksum); try again")
        return data

    def _headers(
        self, reference: ModelReference, commit: str, shards: list[str], files: dict[str, int]
    ) -> dict[str, TensorInfo]:
        found = self._files.map(lambda shard: self._header(reference.path, commit, shard, files[shard]), shards)
        tensors: dict[str, TensorInfo] = {}
        for shard, part in zip(shards, found, strict=True):
            add_shard(tensors, part, shard, str(reference))
        return tensors

    def _header(self, path: str, commit: str, shard: str, size: int) -> dict[str, TensorInfo]:
        shown = f"{path}/{shard}"
        if shard.endswith(".bin"):
            return read_pickle(RandomAccess(shown, size, self._reader(path, commit, shard, size)), exact=False)
        first = self._range(path, commit, shard, 0, min(FIRST_RANGE, size))
        length = header_length(first[:8], shown, size)
        raw = first[8 : 8 + length]
        if len(raw) < length:
            raw += self._range(path, commit, shard, 8 + len(raw), 8 + length)
        return parse_header(raw, shown, 8 + length, size)

    def _reader(
        self, path: str, commit: str, file: str, size: int, at_once: int = FIRST_RANGE
    ) -> Callable[[int, int], bytes]:
        """Reads ranges of a file with few requests: each asks for more than is wanted, and what came is kept."""
        kept: list[tuple[int, bytes]] = []

        def read(start: int, stop: int) -> bytes:
            for offset, data in kept:
                if offset <= start and stop <= offset + len(data):
                    return data[start - offset : stop - offset]
            begin, end = start, min(size, max(stop, start + at_once))
            if size - start <= LAST_RANGE:  # reading goes backwards from the end
                begin, end = max(0, size - LAST_RANGE), size
            kept.append((begin, self._range(path, commit, file, begin, end)))
            return kept[-1][1][start - begin : stop - begin]

        return read

    def dataset(self, reference: ModelReference) -> tuple[str, dict[str, int]]:
        """The commit that a dataset's revision means now, and its files with their sizes."""
        info = self._info(reference, {"blobs": "true"}, "dataset")
        return info.get("sha") or "", {file["rfilename"]: file.get("size") or 0 for file in info.get("siblings") or []}

    def dataset_range(self, reference: ModelReference, commit: str, file: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of a file of a dataset."""
        return self._range(reference.path, commit, file, start, stop, "dataset")

    def _range(self, path: str, commit: str, file: str, start: int, stop: int, kind: Kind = "model") -> bytes:
        """Bytes start..stop of a file of the repository."""
        status, body = self._get(path, commit, file, {"Range": f"bytes={start}-{stop - 1}"}, kind)
        if status == 200:  # the server does not do ranges and sent the whole file
            body = body[start:stop]
        if len(body) != stop - start:
            raise SourceError(f"{path}/{file}: the Hub sent {len(body)} of {stop - start} bytes asked for")
        return body

    def _get(
        self, path: str, commit: str, file: str, headers: dict[str, str], kind: Kind = "model"
    ) -> tuple[int, bytes]:
        """A file of the repository in one request, without the HEAD that the client's own download asks first."""
        return self._request(f"{path}/{file}", self._url(path, commit, file, kind), headers=headers, kind=kind)

    def _request(
        self,
        what: str,
        url: str,
        *,
        headers: Mapping[str, str] = MappingProxyType({}),
        parameters: Mapping[str, str] | None = None,
        kind: Kind = "model",
    ) -> tuple[int, bytes]:
        """Status and body of a GET through the client's session. Raises SourceError, which says `what` was asked for."""
        import httpx2
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import hf_raise_for_status, http_backoff

        with _readable(what, self.endpoint, kind):
            response = http_backoff(
                "GET",
                url,
                headers={**build_hf_headers(token=self._token), **headers},
                params=parameters,
                follow_redirects=True,
                max_retries=RETRIES,
                # Not where no connection could be made: the client would close the session that other threads use.
                retry_on_exceptions=(httpx2.TimeoutException, httpx2.ReadError, httpx2.RemoteProtocolError),
            )
            hf_raise_for_status(response)
        return response.status_code, response.content


def header_cache() -> Path:
    """Where previews keep what headers said, unless they are told another folder."""
    return _store() / "headers"


def written_cache() -> Path:
    """Where the text is kept that models write from short prompts, by its content address."""
    return _store() / "written"


def _store() -> Path:
    """Where downloaded sources lie: beside the client's cache, as `owner--name/commit/`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).parent / "moerge"


def _placed(
    tensors: dict[str, TensorInfo], shown: str, file: str, planned: dict[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """The tensors of a pickle checkpoint's file with their places, which must be those that its ranges told of."""
    found: dict[str, TensorInfo] = {}
    add_shard(found, tensors, file, shown)
    if {name: replace(info, start=None) for name, info in found.items()} != {
        name: info for name, info in planned.items() if info.file == file
    }:
        raise SourceError(
            f"{shown}: holds other tensors than when it was looked at; delete what was downloaded and try again"
        )
    return found


@contextmanager
def _readable(what: str, endpoint: str, kind: str = "model") -> Iterator[None]:
    """Turn the client's exceptions into one sentence each."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise SourceError(
            f"{what}: the {kind} is gated; accept its conditions on its page and pass a token that may read it (HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{what}: there is no such revision in the repository") from None
    except errors.RepositoryNotFoundError as error:
        if _status(error) == 401:
            raise SourceError(
                f"{what}: not found, or private and the token (HF_TOKEN) is missing or wrong; check the name and the token"
            ) from None
        raise SourceError(f"{what}: there is no such {kind} on the Hub, or it is private") from None
    except errors.HfHubHTTPError as error:
        status = _status(error)
        if status == 401:
            raise SourceError(f"{what}: the Hub refused the token; check HF_TOKEN") from None
        if status == 403:
            raise SourceError(f"{what}: the token has no right to read it") from None
        raise SourceError(f"{what}: the Hub answered with status {status}; try again later") from None
    except errors.OfflineModeIsEnabled:
        raise SourceError(f"{what}: HF_HUB_OFFLINE is set, and it is not in the cache") from None
    except errors.LocalEntryNotFoundError:  # the client's word for a Hub that did not answer; before its base class
        raise SourceError(f"{what}: {endpoint} cannot be reached, and the file is not in the cache") from None
    except errors.EntryNotFoundError:
        raise SourceError(f"{what}: there is no such file in the repository") from None
    except httpx2.HTTPError as error:
        raise SourceError(f"{what}: {endpoint} cannot be reached ({type(error).__name__})") from None
    except OSError as error:
        raise SourceError(f"{what}: {error.strerror or error}") from None


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
