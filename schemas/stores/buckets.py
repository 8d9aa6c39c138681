"""How an object store is reached and how hard it is tried."""

from pydantic import Field

from lightopd.schemas.base import StrictModel


class BucketConfig(StrictModel):
    """Settings of `lightopd push` and `lightopd pull`."""

    jobs: int = Field(8, ge=1, le=256)
    """Files that are on their way at the same time."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest one request may take; none carries more than 16 MiB."""
    retry_s: float = Field(120.0, ge=0)
    """For how long a request that fails is tried again, with growing pauses."""
    store: dict[str, str | bool] = {}
    """Options of the store as obstore names them, such as `endpoint`, `region`, `skip_signature`; they come
    before the environment's (`AWS_ENDPOINT_URL`, `AWS_REGION`, `GOOGLE_SERVICE_ACCOUNT`)."""
