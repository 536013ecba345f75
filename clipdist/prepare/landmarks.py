"""Google Landmarks v2 (Weyand et al. 2020, arXiv 2004.01804) as it is published -> pairs; its tars are not unpacked.

    images_000.tar … images_499.tar     members a/b/c/<id>.jpg; below RAW or RAW/train; those that are there are used
    md5.images_000.txt …                beside the tars, or below RAW/md5sum/train
    train.csv                           id, url, landmark_id; this and the tables below in RAW or RAW/metadata
    train_clean.csv                     optional: landmark_id, images (ids parted by spaces), a cleaned subset
    train_label_to_category.csv         optional: landmark_id, category (a URL of Wikimedia Commons)
    train_attribution.csv               optional: id, url, author, license, title

Which tar holds an image, train.csv does not say. So a row whose image is in none of the tars present is *absent*: its
tar was not fetched, or the tar lacks it, and nobody can tell which. Absent rows are counted, never rejected, unless all
500 tars are there whole; then the image is missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipdist.data.sets.pack import Pair, Refused, Rejected
from clipdist.data.shards import checksum_file
from clipdist.errors import UserError, disk_errors
from clipdist.prepare.landmark_tables import (
    Ids,
    TrainTable,
    id_text,
    places_in,
    read_attribution,
    read_clean,
    read_names,
    read_train,
)
from clipdist.prepare.landmark_tars import TARS, TarImages, find_md5, find_tars, index_tars

TRAIN, CLEAN = "train.csv", "train_clean.csv"
NAMES, ATTRIBUTION = "train_label_to_category.csv", "train_attribution.csv"
TEMPLATES = ("a photo of {}",)


@dataclass
class LandmarkPairs:
    """`pairs` of the classes that are kept, in the tars' order; `rejected`; `left_out` counts images by why they are
    not wanted; `classes` maps each label to its landmark and category."""

    pairs: list[Pair]
    rejected: list[Rejected]
    left_out: dict[str, int]
    classes: dict[str, tuple[int, str]]
    notes: dict[str, Any]
    sources: dict[str, str]

    def check(self, folder: Path, limit: float, unreadable: Mapping[int, str] | None = None) -> None:
        """`UserError`, with `folder/rejected.csv`, when more than the share `limit` of all images is rejected; or of
        the pairs, when these (place in `pairs` -> reason) turned out to be `unreadable`."""
        refused = Refused(folder, list(self.rejected), limit, "images")
        refused.total = len(self.pairs) + len(self.rejected) + sum(self.left_out.values())
        if unreadable is not None:
            faults = [Rejected.of(self.pairs[row], reason) for row, reason in unreadable.items()]
            refused = Refused(folder, faults, limit, "images that were looked at")
            refused.total = len(self.pairs)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            refused.check()

    def __str__(self) -> str:
        rows, tars = self.notes["rows"], self.notes["tars"]
        lines = [
            f"{rows['all']:,} rows, {tars['images']:,} images in {tars['count']} of {TARS} tars; "
            f"{rows['absent']:,} rows absent: their images are in none of these tars",
            f"{len(self.pairs):,} images of {len(self.classes):,} landmarks; left out: "
            + (", ".join(f"{count:,} {why}" for why, count in self.left_out.items()) or "none"),
        ]
        if self.rejected:
            lines.append(f"rejected: {len(self.rejected):,}, such as {self.rejected[0]}")
        return "\n".join([*lines, *self.notes["said"]])


def read_landmarks(
    raw: Path,
    *,
    min_images: int = 10,
    clean: bool = False,
    check_md5: bool = True,
    templates: Sequence[str] = TEMPLATES,
    workers: int | None = None,
    quiet: bool = False,
) -> LandmarkPairs:
    """The images of the tars below `raw` that train.csv names, in classes of at least `min_images`.

    Fields of a pair: `label`, the unique friendly name of its landmark, `landmark_id`, `url`, and `author` and
    `license` where there is `train_attribution.csv`. Captions are `templates` with the name in their `{}`. `clean`
    takes the images of `train_clean.csv` alone. `workers`: processes that index tars, None for one on each core.

    Rejected: images of a tar whose md5 is another, that no row names, or that lie in an earlier tar, too; what
    `read_train` rejects; members that are no `<id>.jpg`; and a damaged tar itself, whose images before the damage are
    used. Raises `UserError` where a table is missing or not of version 2, or there are no tars.
    """
    if min_images < 1:
        raise UserError(f"--min-images: found {min_images}, expected at least 1")
    check_templates(templates)
    said: list[str] = []
    images = index_tars(find_tars(raw), find_md5(raw) if check_md5 else {}, workers=workers, quiet=quiet)
    if check_md5 and images.unchecked:
        said.append(f"no md5 file for {images.unchecked} of {len(images.tars)} tars: not compared")
    path = find_table(raw, TRAIN)
    table = read_train(path, images.ids_N, others=images.complete)
    if not len(table.named):
        raise UserError(
            f"{path}: none of its {table.rows:,} rows names one of the {len(images.ids_N):,} images in "
            f"{images.tars[0].path.name} …, such as {id_text(images.ids_N[0])}; expected the train.csv of version 2: "
            f"the first version, and the index and test sets, have other images"
        )
    rejected = [*images.rejected, *table.rejected, *_without_row(images, table.named)]
    rejected += _missing(table) if images.complete else []
    columns = _Columns(images, table)
    left_out: dict[str, int] = {}
    if clean:
        left_out[f"not in {CLEAN}"] = columns.restrict(*read_clean(find_table(raw, CLEAN)), rejected)
    columns.reject_bad_tars(rejected)
    seen, left_out["of too small classes"] = columns.drop_small(min_images)
    names, categories, faulty = read_names(find_table(raw, NAMES)) if has_table(raw, NAMES) else ({}, {}, [])
    rejected += faulty
    kept = np.unique(columns.landmarks).tolist()
    if unnamed := _name_the_rest(names, kept):
        said.append(f"{NAMES} names no category of {unnamed:,} landmarks: their labels are their numbers")
    told, attribution = _attributions(raw, columns.ids, said)
    notes = {
        "tars": {"count": len(images.tars), "images": len(images.ids_N), "md5": images.checked},
        "rows": {"all": table.rows, "absent": 0 if images.complete else table.absent},
        "clean": clean,
        "min_images": min_images,
        "landmarks": {"seen": seen, "kept": len(kept)},
        "attribution": attribution,
        "templates": list(templates),
        "said": said,
    }
    used = [TRAIN, *([CLEAN] if clean else []), *(name for name in (NAMES, ATTRIBUTION) if has_table(raw, name))]
    return LandmarkPairs(
        columns.pairs(names, templates, told),
        rejected,
        left_out,
        {names[landmark]: (landmark, categories.get(landmark, "")) for landmark in kept},
        notes,
        {name: checksum_file(find_table(raw, name)) for name in used},
    )


def _attributions(raw: Path, ids: Ids, said: list[str]) -> tuple[dict[int, dict[str, str]], dict[str, int] | None]:
    """(author and licence of each of the images `ids`, as far as they are told; how many are not told, for the notes,
    None without a table). Images without either are used: they are counted, not rejected."""
    if not has_table(raw, ATTRIBUTION):
        said.append(f"{ATTRIBUTION} is not there: samples carry no author and no licence")
        return {}, None
    told, faulty = read_attribution(find_table(raw, ATTRIBUTION), np.sort(ids))
    author, license = (len(ids) - sum(name in one for one in told.values()) for name in ("author", "license"))
    if author or license:
        said.append(f"{ATTRIBUTION}: {author:,} of {len(ids):,} images carry no author, {license:,} no licence")
    if faulty:
        said.append(f"{ATTRIBUTION}: {len(faulty):,} rows cannot be read, such as {faulty[0]}")
    return told, {"without_author": author, "without_license": license, "faulty_rows": len(faulty)}


def has_table(raw: Path, name: str) -> bool:
    return find_table(raw, name).is_file()


def find_table(raw: Path, name: str) -> Path:
    """Where the table lies, or should."""
    inside = raw / "metadata" / name
    return inside if inside.is_file() else raw / name


def _without_row(images: TarImages, named: Ids) -> list[Rejected]:
    lacking = np.flatnonzero(places_in(images.ids_N, named) < 0)
    return [
        Rejected(None, id_text(images.ids_N[at]), str(images.part(at)), f"no row of {TRAIN} names it")
        for at in lacking.tolist()
    ]


def _missing(table: TrainTable) -> list[Rejected]:
    reason = f"its image is in none of the {TARS} tars"
    found = zip(table.other_rows.tolist(), table.other_ids.tolist(), strict=True)
    return [Rejected(row, id_text(number), "", reason) for row, number in found]


# Rows and images together


class _Columns:
    """The images that a row names, as columns, in the order in which they lie in the tars; they become fewer."""

    def __init__(self, images: TarImages, table: TrainTable) -> None:
        at = places_in(table.ids_R, images.ids_N)
        order = np.lexsort((images.member_N[at], images.tar_N[at]))
        self.images, self.at = images, at[order]
        self.ids, self.landmarks = table.ids_R[order], table.landmarks_R[order]
        self.rows, self.urls = table.rows_R[order], table.urls_R[order]

    def _keep(self, kept: npt.NDArray[np.bool_]) -> None:
        for name in ("at", "ids", "landmarks", "rows", "urls"):
            setattr(self, name, getattr(self, name)[kept])

    def _reject(self, wrong: npt.NDArray[np.bool_], reasons: Sequence[str], rejected: list[Rejected]) -> None:
        for place, reason in zip(np.flatnonzero(wrong).tolist(), reasons, strict=True):
            image = str(self.images.part(self.at[place]))
            rejected.append(Rejected(int(self.rows[place]), id_text(self.ids[place]), image, reason))

    def restrict(self, ids: Ids, landmarks: npt.NDArray[np.int64], rejected: list[Rejected]) -> int:
        """Keeps the images of the cleaned subset; how many are not in it. Another landmark there is a fault."""
        places = places_in(self.ids, ids)
        inside = places >= 0
        other = inside & (landmarks[places] != self.landmarks)
        pairs = zip(self.landmarks[other].tolist(), landmarks[places[other]].tolist(), strict=True)
        self._reject(other, [f"landmark {one} in {TRAIN}, {two} in {CLEAN}" for one, two in pairs], rejected)
        self._keep(inside & ~other)
        return int((~inside).sum())

    def reject_bad_tars(self, rejected: list[Rejected]) -> None:
        tars = self.images.tar_N[self.at]
        wrong = np.isin(tars, list(self.images.wrong_md5))
        self._reject(wrong, [self.images.wrong_md5[tar] for tar in tars[wrong].tolist()], rejected)
        self._keep(~wrong)

    def drop_small(self, min_images: int) -> tuple[int, int]:
        """(landmarks seen, images of those with fewer than `min_images`, which go)."""
        landmarks, codes, sizes = np.unique(self.landmarks, return_inverse=True, return_counts=True)
        few = sizes[codes] < min_images
        if few.all():
            raise UserError(
                f"no landmark has {min_images} images; the largest of {len(landmarks):,} has {sizes.max(initial=0)}: "
                f"fetch more tars, or lower --min-images"
            )
        self._keep(~few)
        return len(landmarks), int(few.sum())

    def pairs(
        self, names: Mapping[int, str], templates: Sequence[str], told: Mapping[int, Mapping[str, str]]
    ) -> list[Pair]:
        found = []
        columns = (self.ids, self.landmarks, self.rows, self.urls, self.at)
        for number, landmark, row, url, at in zip(*(column.tolist() for column in columns), strict=True):
            name = names[landmark]
            fields = {"label": name, "landmark_id": landmark, "url": url or "", **told.get(number, {})}
            text = [template.replace("{}", name) for template in templates]
            found.append(Pair(id_text(number), self.images.part(at), text, fields, row))
        return found


def check_templates(templates: Sequence[str]) -> None:
    """`UserError` unless there are some, each with exactly one `{}`."""
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise UserError(
            f"template {wrong[0] if wrong else 'none'!r}: expected exactly one {{}}, where the name of a class goes"
        )


def _name_the_rest(names: dict[int, str], landmarks: Sequence[int]) -> int:
    """Gives landmarks without a name their number; how many there were."""
    lacking = [landmark for landmark in landmarks if landmark not in names]
    taken = set(names.values())
    for landmark in lacking:
        name = f"landmark {landmark}"
        names[landmark] = f"{name}'" if name in taken else name
    return len(lacking)
