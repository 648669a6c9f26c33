"""Connections to object stores and web servers, by the environment that their tools know; their errors in words.

Reading order: `split`, `locate`, `explain`.
"""

import datetime
import errno
import functools
import os
import re
import urllib.parse
from typing import Any

REQUEST_SECONDS = 60.0
"""Time limit of one request, from the connection to the last byte of the answer."""

CONNECT_SECONDS = 5.0

RETRY_SECONDS = 120.0
"""Time after which no further try begins."""

MAX_RETRIES = 8
STORES = ("gs", "s3", "az")
WEB = ("http", "https")
NO_OBJECT = "there is no object"
"""Text of the error of an address in a bucket that is there."""

_EMULATOR = "STORAGE_EMULATOR_HOST"
_CREDENTIALS = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run where the machine has a role",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
_ENVIRONMENT = re.compile(rf"(?:AWS|GOOGLE|AZURE)_|{_EMULATOR}$|(?:HTTPS?|NO)_PROXY$", re.IGNORECASE)


def split(place: str) -> tuple[str, str, str]:
    """Return scheme, bucket (or server) and key of an address.

    Raises:
        ValueError: nothing here opens such an address.
    """
    scheme, _, rest = place.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme not in (*STORES, *WEB) or not bucket:
        known = ", ".join(f"{name}://" for name in (*STORES, *WEB))
        raise ValueError(f"{place}: nothing here opens such an address; known are {known}, each followed by a name")
    if "@" in bucket:
        raise ValueError(
            f"{scheme}://...@{bucket.rpartition('@')[2]}/{key}: a name and password in an address would stand in logs "
            "and checkpoints; give the address without them, of a server that asks for none"
        )
    if scheme in WEB:
        if "?" in key or "#" in key:
            raise ValueError(f"{place}: an address with a query is not read; give one that ends with the file's name")
        key = urllib.parse.unquote(key)
    return scheme, bucket, key


def locate(place: str, retry_seconds: float | None = None) -> tuple[Any, str]:
    """Return store and key of an address; the connections of a store are kept.

    Args:
        place: the address.
        retry_seconds: time after which no further try begins; None: `RETRY_SECONDS`.
    """
    scheme, bucket, key = split(place)
    environment = tuple(sorted(item for item in os.environ.items() if _ENVIRONMENT.match(item[0])))
    seconds = min(RETRY_SECONDS, RETRY_SECONDS if retry_seconds is None else retry_seconds)
    return _open_store(scheme, bucket, environment, os.getpid(), seconds), key


@functools.lru_cache(64)
def _open_store(
    scheme: str, bucket: str, environment: tuple[tuple[str, str], ...], process: int, retry_seconds: float
) -> Any:
    """Open a store by the environment variables that every tool of its cloud knows."""
    from obstore import store

    found = dict(environment)
    emulator = found.get(_EMULATOR, "")
    endpoint = found.get("AWS_ENDPOINT_URL_S3") or found.get("AWS_ENDPOINT_URL", "")
    plain = scheme == "http" or (scheme == "s3" and endpoint.startswith("http://")) or (scheme == "gs" and emulator)
    client: Any = {
        "timeout": datetime.timedelta(seconds=REQUEST_SECONDS),
        "connect_timeout": datetime.timedelta(seconds=CONNECT_SECONDS),
        **({"allow_http": True} if plain else {}),
    }
    backoff = {"init_backoff": datetime.timedelta(seconds=0.1), "max_backoff": datetime.timedelta(seconds=10)}
    retry: Any = {
        "max_retries": MAX_RETRIES,
        "retry_timeout": datetime.timedelta(seconds=retry_seconds),
        "backoff": backoff,
    }
    if scheme in WEB:
        return store.HTTPStore(f"{scheme}://{bucket}", client_options=client, retry_config=retry)
    if scheme == "gs":
        url = emulator if "://" in emulator else f"http://{emulator}"
        # An emulator asks for no credentials, but obstore would look for some before it writes.
        config: Any = {"base_url": url.rstrip("/"), "bearer_token": "emulator"} if emulator else {}
        return store.GCSStore(bucket, config=config, client_options=client, retry_config=retry)
    if scheme == "az":
        return store.AzureStore(bucket, client_options=client, retry_config=retry)
    provider = None if "AWS_ACCESS_KEY_ID" in found else _boto3_credentials()
    return store.S3Store(bucket, client_options=client, retry_config=retry, credential_provider=provider)


def _boto3_credentials() -> Any:
    """Return what boto3 finds, where it is installed: it knows profiles and single sign-on, which obstore does not."""
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return None
    session = boto3.Session()
    return None if session.get_credentials() is None else Boto3CredentialProvider(session)


def explain(error: Exception, place: str) -> OSError:
    """Return an error of obstore as one of the operating system, with one sentence and the address."""
    from obstore import exceptions

    scheme, bucket, _ = split(place)
    text = " ".join(str(error).partition("Debug source")[0].split())
    status = re.search(r"status code: (\d+ [A-Z][A-Za-z ]*)", text)
    if "NoSuchBucket" in text or "The specified container does not exist" in text:
        return FileNotFoundError(errno.ENOENT, f"there is no bucket {bucket}", place)
    if isinstance(error, FileNotFoundError):
        missing = f"there is no bucket {bucket}" if scheme in STORES and _has_no_bucket(place) else NO_OBJECT
        return FileNotFoundError(errno.ENOENT, missing, place)
    if "ExpiredToken" in text or "TokenExpired" in text:
        return PermissionError(errno.EACCES, f"the credentials have expired; {_CREDENTIALS.get(scheme, text)}", place)
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        said = status[1].strip() if status else "no permission"
        return PermissionError(errno.EACCES, f"the store refuses access ({said}) with the credentials it got", place)
    if "169.254." in text or "token request" in text or "credential" in text.lower():
        return PermissionError(errno.EACCES, f"no credentials were found; {_CREDENTIALS.get(scheme, text)}", place)
    if scheme == "s3" and status and status[1].startswith("30"):
        return OSError(errno.EIO, "the bucket lies in another region; set AWS_REGION", place)
    if scheme in WEB and isinstance(error, exceptions.NotSupportedError):
        return OSError(errno.EIO, "its server gives no parts of files; download it, and give the path on a disk", place)
    if status is None and re.search(r"error sending request|connect|dns|timed out|timeout", text, re.IGNORECASE):
        return TimeoutError(errno.ETIMEDOUT, f"the store cannot be reached, after retries ({text[-120:]})", place)
    said = f"the server answers {status[1].strip()}, after retries" if status else text[:300]
    return OSError(errno.EBUSY if status and status[1].startswith(("5", "429")) else errno.EIO, said, place)


def is_away(error: OSError) -> bool:
    """Return True if a store could not be reached or was too busy, and may take the same later."""
    return isinstance(error, TimeoutError) or error.errno == errno.EBUSY


def _has_no_bucket(place: str) -> bool:
    """Return True if not only an object is missing, but the bucket."""
    import obstore

    store, _ = locate(place)
    try:
        next(iter(obstore.list(store, "clipjax-asks-for-the-bucket", chunk_size=1)), None)
    except Exception as error:
        return "404" in str(error)
    return False
