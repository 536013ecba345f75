"""What the service takes and answers, as JSON."""

from pydantic import BaseModel


class Problem(BaseModel):
    status: int
    message: str


class ErrorBody(BaseModel):
    """Every answer with a status of 400 or more."""

    error: Problem


class ClassName(BaseModel):
    name: str
    title: str


class ClassProbability(ClassName):
    probability: float


class Score(BaseModel):
    """What the model reached, with its 95 % interval where there is one, and the gallery that it was ranked against."""

    title: str
    value: float
    low: float | None
    high: float | None
    gallery: int | None


class GalleryAbout(BaseModel):
    rows: int


class LimitsAbout(BaseModel):
    max_upload_bytes: int
    max_image_pixels: int
    max_text_characters: int
    max_queue: int
    max_batch_files: int
    max_classes: int


class About(BaseModel):
    """`temperature` divides cosines (of a classifier: logits) before the softmax; `calibrated_on` is the split that it
    was fitted on, null when it is the one that training arrived at."""

    name: str
    kind: str
    width: int
    classes: list[ClassName]
    temperature: float
    calibrated_on: str | None
    gallery: GalleryAbout | None
    captions: int
    scores: list[Score]
    notice: str
    limits: LimitsAbout
    relevance: bool
    version: str


class CaptionScore(BaseModel):
    """`score` is the cosine of caption and image."""

    text: str
    score: float


class Neighbour(BaseModel):
    """A row of the gallery; `score` is the cosine with what was asked."""

    row: int
    key: str
    text: str
    score: float


class ImageAnswer(BaseModel):
    """Classes by falling probability, which sum to 1 over all classes, those beyond `top` included. `batched_with`:
    how many images went through the model together, this one included."""

    classes: list[ClassProbability]
    captions: list[CaptionScore]
    neighbours: list[Neighbour]
    seconds: float
    batched_with: int


class TextAnswer(BaseModel):
    hits: list[Neighbour]
    seconds: float


class Queue(BaseModel):
    """Requests that were let in and are not answered yet, and how many there may be."""

    waiting: int
    limit: int


class Place(BaseModel):
    """1 for the request that is computed next; null once it is computed or answered, and for unknown tickets."""

    position: int | None


class Health(BaseModel):
    status: str
