"""Which reader a URL is read through."""

from lightopd.cache.buckets.stores.bucket import Bucket
from lightopd.cache.buckets.stores.hub import Hub
from lightopd.cache.buckets.stores.object_reader import ObjectReader
from lightopd.schemas.stores.buckets import BucketConfig


def opened(url: str, config: BucketConfig | None = None) -> ObjectReader:
    """The objects below a URL, for reading; its own `url` names what does not change, where the store can.

    Raises:
        ConfigError: no store takes the URL.
        InputError: what is named is not there, or the store does not answer.
    """
    return Hub(url, config) if url.startswith("hf:") else Bucket(url, config)
