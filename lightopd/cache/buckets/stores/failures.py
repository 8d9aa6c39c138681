"""What an object store answers when it does not do what was asked, in one line with a remedy."""

import re
from typing import Any

from lightopd.errors import InputError, LightopdError, OutputError
from lightopd.schemas.stores.buckets import BucketConfig

CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (`aws configure export-credentials --format env` prints "
    "those of a profile), GOOGLE_SERVICE_ACCOUNT or AZURE_STORAGE_ACCOUNT_KEY"
)
REMEDIES = {
    "NoSuchBucket": "there is no such bucket; make it, or look at the URL and AWS_ENDPOINT_URL",
    "InvalidBucketName": "that is no name of a bucket; look at the URL",
    "SignatureDoesNotMatch": f"the secret key is wrong; {CREDENTIALS}",
    "InvalidAccessKeyId": f"the store does not know the access key; {CREDENTIALS}",
    "AccessDenied": f"the credentials may not do this; {CREDENTIALS}, or ask the bucket's owner",
    "ExpiredToken": f"the credentials have ended; {CREDENTIALS}",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION",
}
"""By the code in an answer."""


def is_refusal(error: Exception) -> bool:
    """Whether an answer of `not found` speaks of more than the object."""
    return "NoSuchBucket" in str(error)


def bucket_error(error: Exception, verb: str, where: str, config: BucketConfig) -> LightopdError:
    """A store's failure as an error of lightopd: what could not be done, why, and what to do."""
    text = str(error)
    kind = OutputError if verb == "write" else InputError
    return kind(f"cannot {verb} {where}: {_reason(error, text, config)}")


def _reason(error: Exception, text: str, config: BucketConfig) -> str:
    code = next((code for code in re.findall(r"<Code>(\w+)</Code>", text) if code in REMEDIES), None)
    if code is not None:
        return f"{code}: {REMEDIES[code]}"
    if "169.254.169.254" in text or "metadata.google" in text:
        return f"no credentials were found; {CREDENTIALS}"
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return f"the store refuses the credentials; {CREDENTIALS}"
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    if isinstance(error, OSError):
        return f"{error.strerror or error}"
    if "error sending request" in text or "timed out" in text:
        tried = f"tried again for {config.retry_s:g} s"
        return (
            f"the store does not answer ({tried}); look at AWS_ENDPOINT_URL and the network, then run the "
            "same command again: it resumes"
        )
    first = re.sub(r"\s+", " ", text.partition("Debug source")[0]).strip()
    status = re.search(r"status code: (.+?)(?: for|: <|$)", first)
    return f"{status[1] if status else first[:300]}; run the same command again: it resumes"


TOKEN = "set HF_TOKEN, or `hf auth login`"
HUB_REMEDIES = {
    "RepoNotFound": f"the hub shows no such dataset; look at its name, and if it is private, {TOKEN}",
    "RevisionNotFound": "the dataset has no such revision; name a branch, a tag or a commit after the @",
    "GatedRepo": f"the dataset is gated; ask for access on its page, then {TOKEN}",
}
"""By the code in an answer of the Hugging Face hub."""
HUB_STATUSES = {
    401: HUB_REMEDIES["RepoNotFound"],
    403: f"the token may not read it; {TOKEN} with one that may",
    404: HUB_REMEDIES["RepoNotFound"],
    429: f"too many requests; {TOKEN}, which raises the limit, or run the same command later: it resumes",
}
HUB_FINAL = {
    "UnsupportedProtocol": "its address is none that begins with https:// or http://; look at HF_ENDPOINT",
    "InvalidURL": "its address is none; look at HF_ENDPOINT",
    "TooManyRedirects": "it sends from one address to another without end; look at HF_ENDPOINT",
}
"""By the name of an exception of what no second try changes."""


def is_no_object(response: Any) -> bool:
    """Whether the hub says that a file or a folder is not there, and nothing worse."""
    return bool(response.status_code == 404 and response.headers.get("X-Error-Code") == "EntryNotFound")


def hub_error(error: Exception, verb: str, where: str, config: BucketConfig) -> InputError:
    """The hub's failure as an error of lightopd: what could not be done, why, and what to do."""
    return InputError(f"cannot {verb} {where}: {_hub_reason(error, config)}")


def _hub_reason(error: Exception, config: BucketConfig) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        status = response.status_code
        known = HUB_REMEDIES.get(response.headers.get("X-Error-Code", "")) or HUB_STATUSES.get(status)
        return known or f"the hub answers {status}; run the same command again: it resumes"
    if isinstance(error, UnicodeEncodeError):
        return f"the token has letters that no token has; {TOKEN}"
    name = type(error).__name__
    if name in HUB_FINAL:
        return HUB_FINAL[name]
    if name == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set; unset it, or read a cache on this machine"
    return (
        f"the hub does not answer (tried again for {config.retry_s:g} s); look at HF_ENDPOINT and the "
        "network, then run the same command again: it resumes"
    )
